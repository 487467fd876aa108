"""The protected database: connections, sessions, errors."""

"""The wire: connections, queues, frames and messages."""

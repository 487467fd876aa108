"""What mypy alone checks."""

"""A worker process: its day, its reload, what its service manager is told."""

"""When a start may begin, over all workers: the shared row, and the tables."""

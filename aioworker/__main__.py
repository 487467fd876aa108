"""`python -m aioworker`, the same as `aioworker`."""

from aioworker.cli import main

main()

"""`python -m aioworker`, the same as `aioworker`."""

from aioworker.cli.main import main

if __name__ == "__main__":  # a child that multiprocessing spawns imports this, too
    main()

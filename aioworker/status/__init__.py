"""Why a worker waits: said, and stored."""

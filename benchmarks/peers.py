"""The whole job, no rate limit, beside other task queues that send one `UPDATE … JOIN` a chunk.

Each publishes its own chunks to a durable queue, persistent, and runs them by one process, each
acknowledged after its run. What is timed is from the beginning of the first run to the end of the
last; of aioworker also its connecting. The others stand in an environment of their own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks import noop

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support.servers import Servers

CHUNK = 1000
_CONTENDER = "benchmarks.contenders.job_with_"
CONTENDERS = {
    "Celery": (
        f"{_CONTENDER}celery",
        f"celery -A {_CONTENDER}celery worker -c 1 -l error"
        " --without-gossip --without-mingle --without-heartbeat",
    ),
    "Dramatiq": (f"{_CONTENDER}dramatiq", f"dramatiq {_CONTENDER}dramatiq -p 1 -t 1"),
    "Dramatiq, four threads": (
        f"{_CONTENDER}dramatiq",
        f"dramatiq {_CONTENDER}dramatiq -p 1 -t 4",
    ),
    "taskiq": (
        f"{_CONTENDER}taskiq",
        f"taskiq worker {_CONTENDER}taskiq:broker --workers 1 --max-async-tasks 1",
    ),
    "FastStream": (f"{_CONTENDER}faststream", f"faststream run {_CONTENDER}faststream:app"),
}


def seconds(pair: Servers, name: str, folder: Path, ids: Sequence[int], statement: str) -> float:
    """Publish all ids by a contender, and do the job; return how long that took."""
    chunks = [ids[first : first + CHUNK] for first in range(0, len(ids), CHUNK)]
    listed, result = folder / "chunks", folder / "seconds"
    listed.write_text(json.dumps(chunks))
    variables = noop.environment(pair, result) | {
        "NOOP_MESSAGES": str(len(chunks)),
        "JOB_CHUNKS": str(listed),
        "JOB_STATEMENT": statement,
    }
    took, _peak = noop.timed(name, CONTENDERS[name], variables, result)
    return took

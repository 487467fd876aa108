"""Celery: the main job, one start a chunk, by aioworker's own statements.

`python -m benchmarks.contenders.sweep_with_celery IDS AFTER` publishes what is behind an id, so
many ids in a chunk.
"""

import json
import os
import sys
from typing import Any

from celery import Celery

from aioworker import repo
from support import servers, site

app = Celery("sweep", broker=os.environ["AIOWORKER_AMQP_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="sweep.celery",
    task_default_queue_type="quorum",
    broker_transport_options={"confirm_publish": True},
    worker_detect_quorum_queues=True,
)


@app.task(name="refresh", rate_limit=os.environ["AIOWORKER_RATE_LIMIT"])
def refresh(ids: list[int]) -> None:
    """Write what is stale among some add-ons, and note that it ran."""
    connection = servers.connect(os.environ["AIOWORKER_MYSQL_URL"])
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO started VALUES ()")
        cursor.execute(repo.STALE, (json.dumps(ids),))
        [[answers]] = cursor.fetchall()
        rows: list[Any] = [
            (addon, held, answer)
            for addon, missing, held, answer in json.loads(answers or "[]")
            if not missing
        ]
        for first in range(0, len(rows), repo.TRANSACTION_SIZE):
            some = rows[first : first + repo.TRANSACTION_SIZE]
            cursor.execute(repo.WRITE, (json.dumps(some),))
            connection.commit()


def publish(size: int, after: int) -> int:
    """Publish what is swept behind an id; return in how many chunks."""
    database = servers.connect(os.environ["AIOWORKER_MYSQL_URL"])
    with database, database.cursor() as cursor:
        cursor.execute(
            f"SELECT a.id FROM addons a WHERE {site.SWEPT} AND a.id > %s ORDER BY a.id", (after,)
        )
        ids = [addon for [addon] in cursor.fetchall()]
    chunks = [ids[first : first + size] for first in range(0, len(ids), size)]
    with app.connection_for_write() as connection:
        for chunk in chunks:
            refresh.apply_async((chunk,), connection=connection)
    return len(chunks)


if __name__ == "__main__":
    print("published", publish(int(sys.argv[1]), int(sys.argv[2])), "chunks")

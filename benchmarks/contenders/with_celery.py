"""Celery: acknowledged late, no result, one process."""

import os

from celery import Celery

from benchmarks.contenders import MESSAGES, tick

app = Celery("noop", broker=os.environ["NOOP_AMQP_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="noop.celery",
    task_default_queue_type="quorum",
    broker_transport_options={"confirm_publish": True},
    worker_detect_quorum_queues=True,
    worker_prefetch_multiplier=100,
)


@app.task(name="noop")
def noop(number: int) -> None:
    """Do nothing."""
    tick()


if __name__ == "__main__":
    with app.connection_for_write() as connection:
        for each in range(MESSAGES):
            noop.apply_async((each,), connection=connection)

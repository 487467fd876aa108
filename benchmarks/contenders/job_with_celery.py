"""Celery: acknowledged late, no result, one process."""

import os

from celery import Celery

from benchmarks.contenders import job

app = Celery("job", broker=os.environ["NOOP_AMQP_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="job.celery",
    task_default_queue_type="quorum",
    broker_transport_options={"confirm_publish": True},
    worker_detect_quorum_queues=True,
)
refresh = app.task(name="refresh")(job.refresh)


if __name__ == "__main__":
    with app.connection_for_write() as connection:
        for ids in job.chunks():
            refresh.apply_async((ids,), connection=connection)

"""Dramatiq: one process, as many threads as its command says; a deadlock is tried again at once."""

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.contenders import job

broker = RabbitmqBroker(url=os.environ["NOOP_AMQP_URL"], confirm_delivery=True)
dramatiq.set_broker(broker)
refresh = dramatiq.actor(
    job.refresh, actor_name="refresh", queue_name="job.dramatiq", min_backoff=1, max_backoff=10
)


if __name__ == "__main__":
    for ids in job.chunks():
        refresh.send(ids)

"""Dramatiq: one process, its eight threads."""

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.contenders import MESSAGES, tick

broker = RabbitmqBroker(url=os.environ["NOOP_AMQP_URL"], confirm_delivery=True)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="noop.dramatiq")
def noop(number: int) -> None:
    """Do nothing."""
    tick()


if __name__ == "__main__":
    for each in range(MESSAGES):
        noop.send(each)

"""Dead letters under an operator's policies, which a client cannot see."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from aioworker.commands import dead
from aioworker.errors import NotTakenError
from aioworker.rabbitmq.delivery import Delivery
from aioworker.rabbitmq.letter import Filter
from aioworker.rabbitmq.message import LOOK
from aioworker.rabbitmq.queues import Queues
from aioworker.settings import Settings
from support import servers
from tests.conftest import COMMAND_SECONDS, PREFIX, QUEUES, TASK, Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aio_pika.abc import AbstractIncomingMessage

IDS = ["a", "b", "c", "d"]
LOOKS = 10
HOUR_MS = 3_600_000
# Every key that RabbitMQ 3.10 to 4 has for queues, with values under which it takes no letter
# by itself; a None stands for what is no queue's, or makes RabbitMQ send letters elsewhere.
POLICIES: dict[str, list[dict[str, Any]] | None] = {
    "delivery-limit": [{"delivery-limit": limit} for limit in (0, 1, 3)],
    "max-length": [
        {"max-length": len(IDS)},
        {"max-length": len(IDS), "overflow": "drop-head"},
        {"max-length": len(IDS), "overflow": "reject-publish"},
    ],
    "max-length-bytes": [{"max-length-bytes": 4000, "overflow": "drop-head"}],
    "overflow": [{"overflow": "reject-publish"}],
    "message-ttl": [{"message-ttl": HOUR_MS}],
    "expires": [{"expires": HOUR_MS}],
    "dead-letter-exchange": [{"dead-letter-exchange": ""}],
    "dead-letter-routing-key": [
        {"dead-letter-exchange": "", "dead-letter-routing-key": "elsewhere", "delivery-limit": 0}
    ],
    "dead-letter-strategy": [
        {
            "dead-letter-exchange": "",
            "dead-letter-routing-key": "elsewhere",
            "dead-letter-strategy": "at-least-once",
            "overflow": "reject-publish",
            "delivery-limit": 0,
        }
    ],
    "max-in-memory-length": [{"max-in-memory-length": 1}],
    "max-in-memory-bytes": [{"max-in-memory-bytes": 1}],
    "queue-mode": [{"queue-mode": "lazy"}],
    "queue-version": [{"queue-version": 2}],
    "ha-mode": [{"ha-mode": "all"}],
    "ha-params": [{"ha-mode": "exactly", "ha-params": 2}],
    "ha-sync-mode": [{"ha-mode": "all", "ha-sync-mode": "automatic"}],
    "ha-sync-batch-size": [{"ha-mode": "all", "ha-sync-batch-size": 1}],
    "ha-promote-on-shutdown": [{"ha-mode": "all", "ha-promote-on-shutdown": "always"}],
    "ha-promote-on-failure": [{"ha-mode": "all", "ha-promote-on-failure": "always"}],
    "queue-leader-locator": [{"queue-leader-locator": "balanced"}],
    "queue-master-locator": [{"queue-master-locator": "client-local"}],
    "target-group-size": [{"target-group-size": 1}],
    "consumer-timeout": [{"consumer-timeout": 60_000}],
    "delayed-retry-type": None,
    "delayed-retry-min": None,
    "delayed-retry-max": None,
    "consumer-disconnected-timeout": None,
    "max-age": None,
    "stream-max-segment-size-bytes": None,
    "stream-filter-size-bytes": None,
    "initial-cluster-size": None,
    "alternate-exchange": None,
}
CASES = [definition for values in POLICIES.values() for definition in values or ()]
KINDS = ("quorum", "classic")


def task(number: int, kind: str) -> str:
    """Name the task whose queues have the policy of this number."""
    return f"{kind}{number}"


@pytest.fixture(scope="module")
def known(broker: servers.Broker) -> list[str]:
    """The policy keys that this RabbitMQ has, by its own word."""
    asked = "[K || {K, _} <- rabbit_registry:lookup_all(policy_validator)]."
    return re.findall(r"'?([\w-]+)'?[,\]]", broker.control("eval", asked))


@pytest.fixture(scope="module")
def host(
    broker: servers.Broker, known: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A virtual host in which each policy holds for one task of each kind of queue."""
    policies = [
        {
            "vhost": "policies",
            "name": f"policy{number}",
            "pattern": f"^{PREFIX}\\.(quorum|classic){number}(\\.|$)",
            "apply-to": "queues",
            "priority": 1,
            "definition": definition,
        }
        for number, definition in enumerate(CASES)
        if set(definition) <= set(known)
    ]
    rights = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*"}
    path = tmp_path_factory.mktemp("policies") / "definitions.json"
    path.write_text(
        json.dumps(
            {
                "vhosts": [{"name": "policies"}],
                "permissions": [{"vhost": "policies"} | rights],
                "policies": policies,
            }
        )
    )
    broker.control("import_definitions", str(path))
    yield broker.url("policies")
    broker.control("delete_vhost", "policies")


@pytest.fixture
async def channel(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """A channel in that virtual host, which the settings name."""
    monkeypatch.setenv("AIOWORKER_AMQP_URL", host)
    connection = await aio_pika.connect(host)
    yield await connection.channel()
    await connection.close()


async def lay(channel: aio_pika.abc.AbstractChannel, name: str, kind: str) -> Queues:
    """Lay four dead letters of a task, whose queues are declared if need be."""
    queues = Queues.of(name, PREFIX)
    for queue, arguments in queues.arguments(kind).items():
        await channel.declare_queue(queue, durable=True, arguments=arguments)
    for number, letter in enumerate(IDS):
        message = aio_pika.Message(f"body {letter}".encode(), **properties(number, letter))
        await channel.default_exchange.publish(message, queues.dead)
    return queues


async def take(channel: aio_pika.abc.AbstractChannel, queue: str) -> AbstractIncomingMessage:
    """Take one message for good, without RabbitMQ's own header and that of a look."""
    found = await (await channel.get_queue(queue, ensure=False)).get(no_ack=True, timeout=10)
    for name in ("x-delivery-count", LOOK):
        found.headers.pop(name, None)
    return found


async def listed(settings: Settings, name: str) -> list[str]:
    """Return the ids of a task's dead letters, as `dead list` sees them."""
    ids: list[str] = []
    await dead.read_all(
        settings,
        [name],
        Filter(),
        show=lambda _task, letter: ids.append(letter.id),
        end=lambda _task, letters: None,
    )
    return ids


def properties(number: int, name: str) -> dict[str, Any]:
    """Return properties that a look may not lose."""
    at = datetime(2026, 1, 2, 3, 4, number, tzinfo=UTC)
    return {
        "headers": {
            "id": name,
            "task": TASK,
            "x-death": [{"queue": QUEUES.bulk, "reason": "delivery_limit", "time": at, "count": 1}],
            "x-first-death-reason": "delivery_limit",
            "x-aioworker-reason": "why\nindeed",
            "x-aioworker-unreadable": "properties",
            "number": 2**40,
            "nested": {"list": [1, 2.5, None, True, bytearray(b"\xff")]},
        },
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "delivery_mode": 2,
        "priority": number,
        "correlation_id": f"correlation {name}",
        "reply_to": "nobody",
        "message_id": f"message {name}",
        "timestamp": at,
        "type": "a type",
        "user_id": "guest",
        "app_id": "an app",
    }


def test_every_policy_that_this_rabbitmq_has_is_tried(known: list[str]) -> None:
    """A newer one may have keys that nobody has thought about."""
    of_plugins = {key for key in known if key.startswith(("federation-", "shards-", "routing-key"))}

    assert "delivery-limit" in known
    assert set(known) - of_plugins <= set(POLICIES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
async def test_no_look_ends_a_letter(
    channel: aio_pika.abc.AbstractChannel, known: list[str], number: int, kind: str
) -> None:
    """Under `delivery-limit` 3 the fifth list said that there were none."""
    if not set(CASES[number]) <= set(known):
        return  # this RabbitMQ has no such policy
    name = task(number, kind)
    queues = await lay(channel, name, kind)
    settings = Settings.load()

    for look in range(LOOKS):
        assert await listed(settings, name) == IDS, look
    assert await dead.read_one(settings, name, "c", lambda *whole: None)
    assert not await dead.read_one(settings, name, "no such", lambda *whole: None)
    assert (await dead.preview(settings, name, Filter(reason="properties"))).total() == len(IDS)
    await dead.requeue(settings, name, Filter(reason="no such"))
    await dead.drop(settings, name, Filter(reason="no such"))

    for letter_number, letter in enumerate(IDS):
        lies = await take(channel, queues.dead)
        assert lies.body == f"body {letter}".encode()
        sent = properties(letter_number, letter)
        assert {known: getattr(lies, known) for known in sent} == sent


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_a_requeue_and_a_drop_keep_what_they_do_not_mean(
    channel: aio_pika.abc.AbstractChannel, limit: int
) -> None:
    name = task(CASES.index({"delivery-limit": limit}), "quorum")
    queues = await lay(channel, name, "quorum")
    settings = Settings.load()

    await dead.requeue(settings, name, Filter(ids=frozenset({"b"})))
    await dead.drop(settings, name, Filter(ids=frozenset({"c"})))

    assert [(await take(channel, queues.dead)).headers["id"] for _ in range(2)] == ["a", "d"]
    assert (await take(channel, queues.bulk)).headers["id"] == "b"


@pytest.mark.parametrize("free", [dead.requeue, dead.drop])
async def test_a_queue_over_its_limit_says_that_looks_count_and_can_be_freed(
    channel: aio_pika.abc.AbstractChannel, broker: servers.Broker, free: Any
) -> None:
    """The letter in hand can only go back; the error named neither that nor a way out."""
    name = f"over-{free.__name__}"
    queues = await lay(channel, name, "quorum")
    limits = {"max-length": 2, "overflow": "reject-publish", "delivery-limit": 5}
    policy = ("-p", "policies", "--priority", "9", name, f"^{queues.dead}$", json.dumps(limits))
    broker.control("set_policy", *policy)
    settings = Settings.load()

    for _ in range(2):
        with pytest.raises(NotTakenError) as caught:
            async with asyncio.timeout(COMMAND_SECONDS):
                while True:  # until the policy holds
                    await listed(settings, name)
        assert str(caught.value) == (
            f"RabbitMQ did not take the copy of a dead letter for queue {queues.dead}: it is over"
            " its limit, or most of its nodes are down; raise the limit, or free the queue by"
            " `aioworker dead requeue` or `aioworker dead drop --yes` without a filter: until then"
            " each look counts as a delivery of the first letter, and a policy delivery-limit"
            " ends it"
        )
    found = await (await channel.get_queue(queues.dead, ensure=False)).get(timeout=10)
    assert Delivery.of(found).returns == 2 or "x-acquired-count" in found.headers
    await found.nack(requeue=True)
    await free(settings, name, Filter())

    lies, runs = [
        (await channel.declare_queue(queue, passive=True)).declaration_result.message_count
        for queue in (queues.dead, queues.bulk)
    ]
    assert (lies, runs) == (0, len(IDS) if free is dead.requeue else 0)


async def test_a_monitors_look_ends_no_letter(
    channel: aio_pika.abc.AbstractChannel, run: Run, host: str
) -> None:
    """By the commands themselves; `status` takes none at all."""
    name = task(CASES.index({"delivery-limit": 0}), "quorum")
    queues = await lay(channel, name, "quorum")
    variables = {"AIOWORKER_AMQP_URL": host, "AIOWORKER_BUDGET": "worker"}

    for _ in range(3):
        assert run("dead", "list", name, "--json", **variables).stdout.count("\n") == len(IDS)
        assert run("dead", "list", name, **variables).stderr == f"4 dead letters of {name}\n"

    assert [(await take(channel, queues.dead)).headers["id"] for _ in IDS] == IDS

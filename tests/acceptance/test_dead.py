"""Dead letters in a person's hand: seen, brought back, taken away."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import QUEUES, TASK, Lanes, Run

if TYPE_CHECKING:
    import subprocess

BODY = json.dumps([[[7]], {}, None]).encode()


async def letter(lanes: Lanes, message_id: str, reason: str, **headers: Any) -> None:
    """Put a dead letter as the worker makes them."""
    await lanes.send(
        BODY,
        QUEUES.dead,
        headers={
            "task": TASK,
            "id": message_id,
            "retries": 5,
            "x-aioworker-reason": reason,
            "x-aioworker-attempts": 6,
            "x-aioworker-lane": "bulk",
            "x-aioworker-failed-at": "2026-01-02T03:04:05+00:00",
            **headers,
        },
    )


@pytest.fixture
async def three(lanes: Lanes) -> Lanes:
    """Three letters: two refused by the data, one of the urgent lane that took too long."""
    await letter(lanes, "a", "rows refused: frozen")
    await letter(lanes, "b", "rows refused: other\nline")
    now = "2126-01-01T00:00:00+00:00"
    await letter(
        lanes, "c", "took too long", **{"x-aioworker-lane": "urgent", "x-aioworker-failed-at": now}
    )
    return lanes


def ids(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the ids that a list names."""
    assert done.returncode == 0, done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()]


async def test_they_are_listed_and_stay(run: Run, three: Lanes) -> None:
    done = run("dead", "list")

    assert done.stdout == (
        "a 2026-01-02T03:04:05+00:00 lane=bulk attempts=6 rows refused: frozen\n"
        "b 2026-01-02T03:04:05+00:00 lane=bulk attempts=6 rows refused: other line\n"
        "c 2126-01-01T00:00:00+00:00 lane=urgent attempts=6 took too long\n"
    )
    assert done.stderr == f"3 dead letters of {TASK}\n"
    assert await three.count(QUEUES.dead) == 3
    [first, *_rest] = [json.loads(one) for one in run("dead", "list", "--json").stdout.splitlines()]
    assert (first["id"], first["attempts"], first["worker"]) == ("a", 6, None)


async def test_filters_narrow_them(run: Run, three: Lanes) -> None:
    assert ids(run("dead", "list", "--reason", "ROWS refused")) == ["a", "b"]
    assert ids(run("dead", "list", "--id", "c", "--id", "a")) == ["a", "c"]
    assert ids(run("dead", "list", "--older-than", "2h")) == ["a", "b"]
    assert ids(run("dead", "list", "--older-than", "2h", "--reason", "frozen")) == ["a"]
    refused = run("dead", "list", "--older-than", "2")
    assert (refused.returncode, refused.stderr) == (
        2,
        "aioworker: expected an age such as 30m, 2h or 7d, got: '2'\n",
    )


async def test_one_is_shown_whole(run: Run, three: Lanes) -> None:
    shown = run("dead", "show", "b").stdout

    assert "x-aioworker-attempts: 6\n" in shown
    assert shown.endswith(f"\n\n{BODY.decode()}\n")
    missing = run("dead", "show", "nope")
    assert (missing.returncode, missing.stderr) == (
        1,
        f"aioworker: no dead letter of {TASK} has the id 'nope'\n",
    )


async def test_requeued_ones_begin_anew_in_their_lane(run: Run, three: Lanes) -> None:
    done = run("dead", "requeue", "--id", "a", "--id", "c")

    assert done.stdout == f"requeued 2 dead letters of {TASK}\n"
    assert await three.count(QUEUES.dead) == 1
    for lane, message_id in ((QUEUES.bulk, "a"), (QUEUES.urgent, "c")):
        message = await three.take(lane)
        assert message.body == BODY
        message.headers.pop("x-delivery-count", None)  # RabbitMQ's own
        assert message.headers == {"task": TASK, "id": message_id, "retries": 0}


async def test_dropping_asks_first(run: Run, three: Lanes) -> None:
    asked = run("dead", "drop", "--id", "a", text="n\n")
    assert (asked.returncode, asked.stderr.splitlines()[-1]) == (
        1,
        "aioworker: dropped nothing; --yes drops without asking",
    )
    assert await three.count(QUEUES.dead) == 3

    yes = run("dead", "drop", "--id", "a", text="y\n")

    assert (yes.returncode, yes.stdout) == (0, f"dropped 1 dead letter of {TASK}\n")
    assert run("dead", "drop", "--yes").stdout == f"dropped 2 dead letters of {TASK}\n"
    assert await three.count(QUEUES.dead) == 0


async def test_those_that_rabbitmq_set_aside_are_read_too(run: Run, lanes: Lanes) -> None:
    """They carry x-death and nothing of ours."""
    await lanes.send(BODY, headers={"task": TASK, "id": "poison"})
    queue = await lanes.channel.get_queue(QUEUES.bulk, ensure=False)
    await (await queue.get(timeout=10)).reject(requeue=False)

    def listed() -> list[dict[str, Any]]:
        return [json.loads(one) for one in run("dead", "list", "--json").stdout.splitlines()]

    found: list[dict[str, Any]] = []
    while not found:
        found = listed()
    assert (found[0]["id"], found[0]["reason"], found[0]["lane"]) == (
        "poison",
        "set aside by RabbitMQ: rejected",
        "bulk",
    )
    assert found[0]["failed_at"] is not None
    assert run("dead", "requeue").returncode == 0
    assert "x-death" not in (await lanes.take(QUEUES.bulk)).headers

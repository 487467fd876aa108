"""What the log says of a start of several messages, and of each of them."""

from __future__ import annotations

import json
import logging
import time
from datetime import timedelta
from typing import Any

import pytest

from aioworker.clock import own_time
from aioworker.tasks.context import Context
from tests.doubles.gathering import GATHER_SECONDS, INTERVAL, Gathering, gathering_with
from tests.doubles.heart import Heart, running
from tests.doubles.lanes import QUEUES
from tests.fakes import FakeClock


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the lines that were logged: level, words, fields."""
    return [(one.levelname, one.message, vars(one)["fields"]) for one in caplog.records]


class Strange:
    """An id whose own code fails."""

    def __hash__(self) -> int:
        return hash(1)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("strange")


async def test_a_start_has_one_line_and_each_of_its_messages_one_for_debugging(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aioworker.consumer")
    gathering = Gathering(stale={1, 2, 7})
    gathering.send([1, 2, 3])
    gathering.send([5])
    gathering.send([7], QUEUES.urgent)
    gathering.send([8])

    await gathering.heart.run_for(clock, 2)

    lines = told(caplog)
    assert [(level, text) for level, text, _fields in lines] == [
        ("INFO", "nothing to write"),
        ("DEBUG", "chunk done"),
        ("DEBUG", "chunk done"),
        ("INFO", "start done"),
        ("DEBUG", "chunk done"),
        ("DEBUG", "chunk done"),
    ]
    unneeded, start = lines[0][2], lines[3][2]
    assert (unneeded["messages"], unneeded["ids"], unneeded["needed"]) == (2, 2, 0)
    counted = {"messages": 2, "urgent": 1, "bulk": 1, "ids": 4, "needed": 3, "changed": 3}
    assert start.items() >= counted.items()
    each = {fields["message_id"]: fields["changed"] for *_rest, fields in lines[4:]}
    assert each == {"7": 1, "1": 2}


@pytest.mark.parametrize(
    ("chunks", "words", "missing"),
    [
        ([[1, 1001], [2, 1002]], "start done", 2),
        ([[1001], [1002, 1003]], "nothing to write", 3),
        ([[1, 1001]], "chunk done", 1),
    ],
)
async def test_what_reads_have_counted_is_in_the_line(
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    chunks: list[list[int]],
    words: str,
    missing: int,
) -> None:
    """As the main job counts ids that are missing: in `needed`, which leaves them out."""
    caplog.set_level(logging.INFO, "aioworker.consumer")

    async def refresh(ctx: Context, ids: list[int]) -> None:
        ctx.changed(ids)
        ctx.counts["missing"] += 0

    async def needed(ctx: Context, ids: list[int]) -> list[int]:
        ctx.counts["missing"] += sum(one >= 1000 for one in ids)
        return [one for one in ids if one < 1000]

    heart = Heart(refresh, rate="2/m", gather_seconds=GATHER_SECONDS)
    heart.task.needed(needed)
    for chunk in chunks:
        heart.broker.send(json.dumps([[chunk], {}, None]).encode(), id=str(chunk[0]))

    await heart.run_for(clock, 2)

    assert [(line, fields["missing"]) for _, line, fields in told(caplog)] == [(words, missing)]


async def test_the_time_of_what_needs_nothing_is_its_own(
    clock: FakeClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read takes 3 s; a message that was refused before it had ended by then."""
    passed, monotonic = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + passed[0])
    gathering = Gathering()

    async def needed(_ids: list[int]) -> list[int]:
        passed[0] += 3
        return []

    gathering.heart.task.needed(needed)
    gathering.send([20])
    gathering.heart.broker.send(b"nonsense", QUEUES.bulk, id="bad")
    caplog.set_level(logging.INFO, "aioworker.consumer")

    await gathering.heart.run_for(clock, 1)

    [seconds] = [
        fields["run_seconds"] for _, words, fields in told(caplog) if words == "chunk done"
    ]
    assert seconds >= 3


async def test_several_that_expire_while_they_are_held_are_warned_of(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    gathering = Gathering()
    heart = gathering.heart
    gathering.send([1])
    async with running(heart):
        await clock.advance(12)
        caplog.set_level(logging.INFO, "aioworker.consumer")
        expires = own_time() + timedelta(hours=1)
        gathering.send([2], QUEUES.bulk, expires=expires.isoformat())
        gathering.send([3], QUEUES.bulk, expires=expires.isoformat())
        await clock.advance(4)
        heart.budget.now = lambda: expires  # type: ignore[method-assign]
        await clock.advance(INTERVAL, step=0.5)

    assert [(level, words) for level, words, _ in told(caplog)] == [("WARNING", "chunks expired")]


async def test_whatever_a_task_counts_harms_no_start(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioworker.consumer")

    async def refresh(ctx: Context, ids: list[int]) -> None:
        dict.update(ctx.counts, {"ids": "many", "messages": 3})

    heart = gathering_with(refresh)
    for one in range(1, 3):
        heart.broker.send(json.dumps([[[one]], {}, None]).encode(), id=str(one))

    async with running(heart) as serving:
        await clock.advance(2, step=0.1)
        assert not serving.done()

    fields = vars(caplog.records[-1])["fields"]
    assert (fields["messages"], fields["counts.messages"], fields["ids"]) == (2, 3, 2)


async def test_strange_ids_of_changed_rows_harm_nobody(clock: FakeClock) -> None:
    async def refresh(ctx: Context, ids: list[int]) -> None:
        ctx.changed([Strange()])

    heart = gathering_with(refresh)
    for one in range(1, 4):
        heart.broker.send(json.dumps([[[one]], {}, None]).encode(), id=str(one))

    async with running(heart) as serving:
        await clock.advance(2, step=0.1)
        assert not serving.done()

    assert heart.broker.acknowledged == ["1", "2", "3"]
    assert heart.consumer.under_way == []

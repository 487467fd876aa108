"""Dead letters in a person's hand: seen, brought back, taken away."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from aioworker.commands import dead
from aioworker.errors import AioworkerError
from aioworker.rabbitmq.letter import Filter
from aioworker.rabbitmq.queues import Queues
from aioworker.settings import Settings
from tests.conftest import (
    AIOWORKER,
    COMMAND_SECONDS,
    PREFIX,
    QUEUES,
    TASK,
    Lanes,
    Run,
    current_versions,
    declare,
    eventually,
    simple_addons,
    summary,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

    from support import servers
    from tests.conftest import Worker

    Start = Callable[..., Worker]

pytestmark = pytest.mark.usefixtures("shop")  # the main job has a budget
BODY = json.dumps([[[7]], {}, None]).encode()


async def letter(
    lanes: Lanes, message_id: str, reason: str, queue: str = QUEUES.dead, **headers: Any
) -> None:
    """Put a dead letter as the worker makes them."""
    await lanes.send(
        BODY,
        queue,
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
    """Twice the same: a look leaves nothing behind that is shown."""
    shown = run("dead", "show", "b").stdout

    assert "\n    x-aioworker-attempts: 6\n" in shown
    assert run("dead", "show", "b").stdout == shown
    assert shown.endswith(f"\n\n    body: {BODY.decode()}\n")
    missing = run("dead", "show", "nope")
    assert (missing.returncode, missing.stderr) == (
        1,
        f"aioworker: no dead letter of {TASK} has the id 'nope'\n",
    )


async def test_no_header_passes_for_a_line_of_ours(run: Run, lanes: Lanes) -> None:
    """`aioworker: queue gone` stood there as if the command had failed."""
    await letter(lanes, "a", "why", **{"aioworker": "queue gone", "b 2026-01-01 lane=bulk": "so"})

    first, *rest = run("dead", "show", "a").stdout.splitlines()

    assert first.startswith("a 2026-01-02T03:04:05+00:00 ")
    assert "    aioworker: queue gone" in rest
    assert all(line.startswith("    ") for line in rest if line)


async def test_requeued_ones_begin_anew_in_their_lane(run: Run, three: Lanes) -> None:
    done = run("dead", "requeue", "--id", "a", "--id", "c")

    assert done.stdout == f"requeued 2 dead letters of {TASK}\n"
    assert await three.count(QUEUES.dead) == 1
    for lane, message_id in ((QUEUES.bulk, "a"), (QUEUES.urgent, "c")):
        message = await three.take(lane)
        assert message.body == BODY
        message.headers.pop("x-delivery-count", None)  # RabbitMQ's own
        assert message.headers == {"task": TASK, "id": message_id, "retries": 0}


@pytest.mark.parametrize(("command", "done"), [("requeue", "requeued"), ("drop", "dropped")])
async def test_an_id_that_no_letter_has_is_named_and_the_others_are_done(
    run: Run, three: Lanes, command: str, done: str
) -> None:
    """It said `requeued 0`, and that all was well."""
    yes = ["--yes"] if command == "drop" else []

    asked = run("dead", command, "--id", "nope", "--id", "b", "--id", "gone", *yes)

    assert (asked.returncode, asked.stdout) == (1, f"{done} 1 dead letter of {TASK}\n")
    assert asked.stderr == f"aioworker: no dead letter of {TASK} has the id 'gone', 'nope'\n"
    assert await three.count(QUEUES.dead) == 2


async def test_what_has_expired_is_run_once_it_is_brought_back(
    run: Run, lanes: Lanes, shop: Connection[Cursor]
) -> None:
    """It was acknowledged unrun, and nowhere to be found."""
    simple_addons(shop, 7)
    await letter(lanes, "late", "expired", expires="2026-01-02T03:04:05+00:00", eta="2026-01-02")

    assert run("dead", "requeue").returncode == 0
    done = run("consume", "--burst", "--rate-limit", "100/s")

    assert done.stdout == summary(1)
    assert current_versions(shop)[7] == 10_007


async def test_no_letter_is_touched_while_rabbitmq_is_short_of_memory(
    run: Run, three: Lanes, broker: servers.Broker
) -> None:
    """A copy would not be confirmed, and the letter in hand be given back: counted."""
    policy = ("set_policy", "alarmed", f"^{QUEUES.dead}$", '{"delivery-limit": 0}')
    broker.control(*policy)
    broker.control("set_vm_memory_high_watermark", "0.000001")
    try:
        alarms = ("eval", "rabbit_alarm:get_alarms().")
        eventually(lambda: "memory" in broker.control(*alarms), "an alarm")
        listed = run("dead", "list", AIOWORKER_CONNECT_TIMEOUT="2")
    finally:
        broker.control("set_vm_memory_high_watermark", "absolute", "512MB")

    assert (listed.returncode, listed.stdout) == (1, "")
    assert "out of memory or disk perhaps" in listed.stderr
    assert ids(run("dead", "list")) == ["a", "b", "c"]
    broker.control("clear_policy", "alarmed")


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


async def test_more_than_a_consumer_may_hold_are_all_seen(run: Run, lanes: Lanes) -> None:
    """A quorum queue sends 2,000 at most to a consumer that settles none."""
    await asyncio.gather(*[letter(lanes, f"m{number}", "refused") for number in range(2500)])
    last = "m2499"

    assert sorted(ids(run("dead", "list"))) == sorted(f"m{number}" for number in range(2500))
    assert run("dead", "show", last).stdout.startswith(f"{last} ")
    assert run("dead", "requeue", "--id", last).stdout == f"requeued 1 dead letter of {TASK}\n"
    assert (await lanes.take(QUEUES.bulk)).headers["id"] == last
    assert run("dead", "drop", "--yes").stdout == f"dropped 2499 dead letters of {TASK}\n"
    assert await lanes.count(QUEUES.dead) == 0


async def test_large_ones_that_take_long_to_arrive_are_all_seen(run: Run, lanes: Lanes) -> None:
    """RabbitMQ says that none is ready while the last one is on its way."""
    for number in range(30):
        await lanes.send(b" " * 3_000_000, QUEUES.dead, headers={"task": TASK, "id": f"m{number}"})

    assert len(ids(run("dead", "list"))) == 30


@pytest.fixture
def asking(pair: servers.Servers) -> Iterator[Callable[..., Asking]]:
    """Make drops that ask."""
    made: list[Asking] = []

    def make(*arguments: str) -> Asking:
        made.append(Asking(pair, *arguments))
        return made[-1]

    yield make
    for one in made:
        one.end()


class Asking:
    """A `drop` on a terminal of its own, at its question."""

    def __init__(self, pair: servers.Servers, *arguments: str) -> None:
        command = [str(AIOWORKER), "dead", "drop", *arguments]
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            os.execve(command[0], command, pair.environment)
        self._status: int | None = None
        self.said = ""
        self._read_until("[y/N]")

    def _read_until(self, text: str) -> None:
        while text not in self.said:
            assert select.select([self._terminal], [], [], COMMAND_SECONDS)[0], self.said
            self.said += os.read(self._terminal, 4096).decode()

    def type(self, text: str) -> None:
        """Type something."""
        os.write(self._terminal, text.encode())

    def ends(self) -> int:
        """Return the exit status, once it ends."""
        with suppress(OSError):  # how Linux tells the end of a terminal
            self._read_until("\0")
        _pid, status = os.waitpid(self.pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_at_the_question_drops_nothing(
    asking: Callable[..., Asking], three: Lanes, number: signal.Signals
) -> None:
    command = asking()

    if number is signal.SIGINT:
        command.type("\x03")
    else:
        os.kill(command.pid, number)

    assert command.ends() == 1
    last = command.said.splitlines()[-1].removeprefix("^C")  # what a terminal shows of the key
    assert last == f"aioworker: stopped by {number.name}; dropped nothing"
    assert await three.count(QUEUES.dead) == 3


async def test_nothing_is_hidden_while_a_drop_asks(
    run: Run, asking: Callable[..., Asking], three: Lanes
) -> None:
    command = asking()

    assert await three.count(QUEUES.dead) == 3
    assert ids(run("dead", "list")) == ["a", "b", "c"]
    assert run("dead", "requeue", "--id", "b").returncode == 0
    await letter(three, "d", "came while it asked")
    command.type("y\n")

    assert command.ends() == 0
    assert command.said.splitlines()[-2:] == [
        f"dropped 2 dead letters of {TASK}",
        "1 dead letter of those shown did not lie there any more",
    ]
    assert ids(run("dead", "list")) == ["d"]


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_a_look_waits_for_another_ones_end(
    run: Run, lanes: Lanes, start: Start, queue_type: str
) -> None:
    """Two that take turns at the same letters would each see a part, some of it twice."""
    queues = Queues.of(f"looked-at-{queue_type}", PREFIX)
    await declare(lanes.connection, queues, queue_type)
    task = queues.dead.split(".")[1]
    for number in range(200):
        await letter(lanes, f"m{number}", "refused", queue=queues.dead)

    looks = [start("dead", "list", task) for _ in range(3)]

    # Whoever steps back puts the first letter behind the others: a nack would be a delivery.
    expected = sorted(f"m{number}" for number in range(200))
    for one in looks:
        assert one.process.wait(COMMAND_SECONDS) == 0, one.log
        assert sorted(line.split()[0] for line in one.log.splitlines()[:-1]) == expected
    both = [start("dead", "requeue", task) for _ in range(2)]
    assert [one.process.wait(COMMAND_SECONDS) for one in both] == [0, 0]
    parts = [int(one.log.partition("requeued ")[2].split()[0]) for one in both]
    assert sum(parts) == await lanes.count(queues.bulk) == 200
    assert await lanes.count(queues.dead) == 0


async def test_a_program_that_consumes_the_letters_is_said(run: Run, three: Lanes) -> None:
    """Else an empty list would read as if there were none."""
    arrived: asyncio.Queue[object] = asyncio.Queue()
    queue = await three.channel.get_queue(QUEUES.dead, ensure=False)
    await queue.consume(arrived.put)
    for _ in range(3):
        await arrived.get()

    listed = run("dead", "list", AIOWORKER_CONNECT_TIMEOUT="2")

    assert (listed.returncode, listed.stdout) == (1, "")
    assert listed.stderr == (
        f"aioworker: somebody else looks at the dead letters in {QUEUES.dead}, or another program"
        " consumes them: try again when that has ended; listed 0 dead letters before that\n"
    )


async def test_what_hides_one_tasks_letters_hides_no_others(
    pair: servers.Servers, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that somebody consumes ended the list; a connection was opened twice a task."""
    held, last = (Queues.of(name, PREFIX) for name in ("held", "last"))
    for queues in (held, last):
        await declare(lanes.connection, queues)
        await (await lanes.channel.get_queue(queues.dead, ensure=False)).purge()
    for queue in (QUEUES.dead, held.dead, last.dead):
        await letter(lanes, f"of {queue}", "refused", queue=queue)
    consumed = await lanes.channel.get_queue(held.dead, ensure=False)
    await consumed.consume(asyncio.Queue[object]().put)
    monkeypatch.setenv("AIOWORKER_AMQP_URL", pair.amqp_url)
    monkeypatch.setenv("AIOWORKER_MYSQL_URL", pair.mysql_url)
    settings = Settings.load(connect_timeout="1", budget="worker")
    opened: list[object] = []
    connect = aio_pika.connect

    async def counted(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        return await connect(*arguments, **options)

    monkeypatch.setattr(aio_pika, "connect", counted)

    shown: list[tuple[str, Any]] = []

    with pytest.raises(AioworkerError) as caught:
        await dead.read_all(
            settings,
            [TASK, "held", "update_current_versio", "last"],
            Filter(),
            show=lambda task, letter: shown.append((task, letter.id)),
            end=lambda task, letters: shown.append((task, letters)),
        )

    of_task, of_last = (f"of {queue}" for queue in (QUEUES.dead, last.dead))
    assert shown == [(TASK, of_task), (TASK, 1), ("last", of_last), ("last", 1)]
    assert str(caught.value) == (
        f"somebody else looks at the dead letters in {held.dead}, or another program consumes"
        " them: try again when that has ended; listed 0 dead letters of held before that; queue"
        " aioworker.update_current_versio.dead does not exist: check the task's name,"
        " 'update_current_versio', and the app (--app, AIOWORKER_APP), then run `aioworker init`"
    )
    assert len(opened) == 2


@pytest.mark.parametrize("option", ["--reason", "--id"])
async def test_an_empty_filter_is_refused(run: Run, three: Lanes, option: str) -> None:
    """An empty variable of the shell would drop them all."""
    done = run("dead", "drop", option, "", "--yes")

    assert (done.returncode, done.stderr) == (
        2,
        f"aioworker: expected {option} with a text, got: ''; without it, all are meant\n",
    )
    assert await three.count(QUEUES.dead) == 3


async def test_those_of_a_task_that_is_gone_are_reached(run: Run, lanes: Lanes) -> None:
    """Whoever renames a task finds what the old one left."""
    gone = Queues.of("renamed", PREFIX)
    await declare(lanes.connection, gone)
    await lanes.send(BODY, gone.dead, headers={"task": "renamed", "id": "left"})

    assert ids(run("dead", "list", "renamed")) == ["left"]
    assert run("dead", "show", "left", "--task", "renamed").returncode == 0
    assert run("dead", "show", "renamed", "left").returncode == 0
    assert run("dead", "requeue", "renamed").stdout == "requeued 1 dead letter of renamed\n"
    assert (await lanes.take(gone.bulk)).body == BODY
    assert run("dead", "drop", "renamed", "--yes").stdout == "dropped 0 dead letters of renamed\n"
    unknown = run("dead", "list", "update_curent_version")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "aioworker: queue aioworker.update_curent_version.dead does not exist: unknown task"
        f" 'update_curent_version', did you mean {TASK}?\n",
    )


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


async def test_a_letter_that_rabbitmq_made_too_large_for_a_frame_hides_no_other(
    run: Run, lanes: Lanes
) -> None:
    """No copy of it could be sent: each look ended there, with a delivery more."""
    large = {"task": TASK, "id": "edge", "x": "y" * 130_900}
    await lanes.send(BODY, headers=large, expiration=0.2)

    async with asyncio.timeout(COMMAND_SECONDS):
        while not await lanes.count(QUEUES.dead):
            pass  # each count asks RabbitMQ
    await letter(lanes, "behind", "refused")

    for _ in range(3):
        assert ids(run("dead", "list")) == ["edge", "behind"]
    assert "\n    x-aioworker-left-out: x\n" in run("dead", "show", "edge").stdout
    assert run("dead", "requeue", "--id", "edge").returncode == 0
    assert (await lanes.take(QUEUES.bulk)).headers["x-aioworker-left-out"] == "x"


async def test_those_that_rabbitmq_set_aside_after_a_retry_say_both(run: Run, lanes: Lanes) -> None:
    """A copy for the retry queue carries the reason of that retry."""
    retried = {
        "x-aioworker-reason": "Lock wait timeout exceeded",
        "x-aioworker-first-failed-at": "2026-01-02T03:04:05+00:00",
    }
    await lanes.send(BODY, headers={"task": TASK, "id": "poison", "retries": 1, **retried})
    queue = await lanes.channel.get_queue(QUEUES.bulk, ensure=False)
    await (await queue.get(timeout=10)).reject(requeue=False)

    found: list[str] = []
    while not found:
        found = run("dead", "list", "--json").stdout.splitlines()

    told = json.loads(found[0])
    assert told["reason"] == (
        "set aside by RabbitMQ: rejected; the last retry was for: Lock wait timeout exceeded"
    )
    assert told["first_failed_at"] == "2026-01-02T03:04:05+00:00"
    assert datetime.fromisoformat(told["failed_at"])
    seconds = 0
    while not ids(run("dead", "list", "--older-than", "1s")):
        seconds += 1
        assert seconds < COMMAND_SECONDS

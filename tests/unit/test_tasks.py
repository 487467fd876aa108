"""Any function can be a task; what cannot be one is refused where it is registered."""

from __future__ import annotations

import functools
import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aioworker import Context, task
from aioworker import task as decorator
from aioworker.errors import RateLimitError, TaskError, UsageError
from aioworker.tasks import registry
from aioworker.tasks.registry import check_publishable, find, registered
from aioworker.tasks.task import AnyTask


def pages() -> Iterator[list[int]]:
    yield [1]


async def by_ids(ctx: Context, ids: list[int]) -> None: ...


def by_rows(rows: list[tuple[int, float]], unit: str = "day") -> None: ...


def by_any_rows(rows: list[list[Any]]) -> None: ...


async def with_anything(name: str, *, times: int = 1) -> None: ...


class Own(Context):
    """Which nobody makes."""


def context_by_name(*, ctx: Context) -> None: ...


def own_context(ctx: Own) -> None: ...


def by_set(ids: set[int]) -> None: ...


class Shop:
    """A class with a method."""

    def refresh(self, shop: int) -> None:
        """Do nothing."""


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test registers for itself."""
    monkeypatch.setattr(registry, "_registry", {})


def test_a_decorated_function_is_still_itself() -> None:
    @task
    def double(number: int) -> int:
        """Twice."""
        return 2 * number

    assert double(4) == 8
    assert (double.name, double.__doc__) == ("double", "Twice.")
    assert registered() == ["double"]


# As of 3.14 annotations are evaluated where somebody reads them, if ever.
FUTURE = "" if sys.version_info >= (3, 14) else "from __future__ import annotations\n"


def test_annotations_that_cannot_be_resolved_are_known_by_their_text() -> None:
    """What a module imports for its type checker alone."""
    module: dict[str, Any] = {}
    source = FUTURE + "def stale(ctx: Context, ids: list[int], since: Moment): ..."
    exec(compile(source, "stale.py", "exec", dont_inherit=True), module)

    signature = decorator(module["stale"]).signature

    assert (signature.context, signature.takes_ids) == (True, True)
    assert signature.shown == "(ids, since)"


async def test_a_coroutine_is_awaited_as_before() -> None:
    @task(name="shop.answer", rate_limit="2/m")
    async def answer() -> int:
        return 42

    assert await answer() == 42
    assert find("shop.answer") is answer
    assert str(answer.rate_limit) == "2/m"


@pytest.mark.parametrize(
    ("options", "function", "line"),
    [
        (
            {"name": "a b"},
            by_ids,
            "expected a task's name of 1 to 100 letters, digits, '_', '-' and '.', not ending in"
            " .urgent, .retry, .dead, got: 'a b'",
        ),
        ({"name": "x.retry"}, by_ids, None),
        ({"name": "x" * 101}, by_ids, None),
        ({"name": ""}, by_ids, None),
        (
            {"keys": pages},
            lambda: None,
            None,
        ),
        (
            {"name": "none", "keys": pages},
            lambda: None,
            "task 'none': expected a parameter for the chunk, since it has keys, got: ()",
        ),
        (
            {"name": "only_context", "keys": pages},
            lambda ctx: None,
            None,
        ),
        (
            {"max_retries": -1},
            by_ids,
            "task 'by_ids': expected max_retries from 0 to 1000, got: -1",
        ),
        ({"timeout": 0}, by_ids, "task 'by_ids': expected timeout from 1 to 1500 seconds, got: 0"),
        (
            {"keys": pages, "constants": ("up", "down")},
            by_rows,
            "task 'by_rows': a sweep calls it with a chunk and 2 constants, got (rows,"
            " unit='day'): too many positional arguments; a context is annotated `Context`",
        ),
        (
            {},
            context_by_name,
            "task 'context_by_name': expected `Context` itself as an annotation, of the first"
            " positional parameter alone, got: ctx: aioworker.tasks.context.Context",
        ),
        (
            {},
            own_context,
            "task 'own_context': expected `Context` itself as an annotation, of the first"
            f" positional parameter alone, got: ctx: {__name__}.Own",
        ),
        (
            {},
            Shop.refresh,
            "task 'refresh': nothing is passed as 'self': register a function, or the method of an"
            " object, as in `task(shop.refresh)`",
        ),
        (
            {"keys": pages},
            by_set,
            "task 'by_set': expected its chunk annotated as ids, list[int], or as rows, such as"
            " list[tuple[int, str]], got: ids: set[int]",
        ),
        (
            {"keys": lambda region: []},
            by_ids,
            "task 'by_ids': keys are called with a first parameter annotated `Context` and with"
            " 'after', where they have them: missing a required argument: 'region'",
        ),
        ({"keys": lambda ctx, after: []}, by_ids, None),
        ({}, max, None),
        ({}, int, "expected a function as a task, got: <class 'int'>"),
        ({}, pages, "task 'pages': expected a function that returns, got a generator"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    options: dict[str, Any], function: Callable[..., Any], line: str | None
) -> None:
    if options.get("name") == "only_context":
        function.__annotations__["ctx"] = Context
    with pytest.raises(TaskError) as refusal:
        decorator(**options)(function)

    assert "\n" not in str(refusal.value)
    if line is not None:
        assert str(refusal.value) == line
    assert registered() == []


def test_a_method_of_an_object_is_a_function() -> None:
    assert task(Shop().refresh).signature.shown == "(shop)"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement `type` came with it")
def test_a_context_behind_another_name_is_one() -> None:
    module: dict[str, Any] = {"Context": Context}
    exec("type Ctx = Context\ndef note(ctx: Ctx, text: str) -> None: ...", module)

    assert task(module["note"]).signature.context


def test_a_task_can_be_a_key_and_be_registered_under_a_second_name() -> None:
    first = task(by_ids)

    second = task(name="urgent_ids")(first)

    assert {first: 1, second: 2}[second] == 2
    assert second.signature.context
    assert registered() == ["by_ids", "urgent_ids"]


@dataclass
class Refresh:
    """A task with settings of its own, which cannot be hashed."""

    name: str

    def __call__(self, ctx: Context, ids: list[int]) -> None:
        """Do nothing."""


def test_an_object_that_cannot_be_hashed_can_be_a_task() -> None:
    made = task(name="refresh")(Refresh("eu"))

    made.needed(Refresh("us"))

    assert (made.name, made.signature.context) == ("refresh", True)
    assert made.reads is not None
    assert made.reads.context


def test_a_rate_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(RateLimitError, match=r"^task 'by_ids': .* write '2/m'$"):
        task(rate_limit="2/min")(by_ids)


def test_two_tasks_of_one_name_are_one_too_many() -> None:
    task(name="rating")(by_ids)

    with pytest.raises(TaskError) as refusal:
        task(name="rating")(by_rows)

    assert str(refusal.value) == (
        f"task 'rating' is registered twice: by {__name__}.by_ids and by {__name__}.by_rows;"
        " give one of them another name="
    )


class Rates:
    """A task with a state of its own."""

    def __init__(self, region: str) -> None:
        self.region = region

    def __call__(self, shop: int) -> None:
        """Do nothing."""


def in_a_loop(region: str) -> None:
    @task
    def sync(shop: int) -> str:
        return region


SAME = [
    ("by_rows", lambda region: task(name="by_rows")(functools.partial(by_rows, [(1, 0.5)]))),
    ("rates", lambda region: task(name="rates")(Rates(region))),
    ("sync", in_a_loop),
    ("by_ids", lambda region: task(by_ids)),
]


@pytest.mark.parametrize(("name", "register"), SAME, ids=["partial", "object", "loop", "function"])
def test_what_looks_the_same_is_one_too_many_too(name: str, register: Callable[[str], Any]) -> None:
    """Else the last one would run in silence for all of them."""
    register("eu")
    first = find(name)

    with pytest.raises(TaskError, match=f"^task '{name}' is registered twice: by "):
        register("us")

    assert find(name) is first


MODULE = """
from aioworker import task

@task
def note(text: str) -> None: ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that can be imported as `notes`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "notes", raising=False)
    path = tmp_path / "notes.py"
    path.write_text(MODULE)
    return path


def test_a_module_that_is_loaded_again_means_its_newest_function(module: Path) -> None:
    """Wherever its lines have moved to."""
    notes = importlib.import_module("notes")
    module.write_text("# A longer one.\n" + MODULE)

    importlib.reload(notes)

    assert find("note") is notes.note


def test_a_module_that_is_loaded_again_cannot_register_twice(module: Path) -> None:
    notes = importlib.import_module("notes")
    module.write_text(MODULE + MODULE)

    with pytest.raises(TaskError, match=r"by notes\.note and by notes\.note; give one of them"):
        importlib.reload(notes)


def test_a_script_that_is_imported_as_well_registers_once(module: Path) -> None:
    """Its own import, or that of a module beside it: one function under two modules' names."""
    module.write_text(MODULE + "\nif __name__ == '__main__':\n    import notes\n")

    runpy.run_path(str(module), run_name="__main__")

    assert find("note") is sys.modules["notes"].note


ARGUMENTS: list[tuple[dict[str, Any], Callable[..., Any], list[Any], dict[str, Any], Any]] = [
    ({"keys": pages}, by_ids, [[[7], 5, 7]], {}, [[7, 5]]),
    ({"keys": pages}, by_ids, [[0]], {}, "expected ids from 1 to 9223372036854775807, got: 0"),
    ({"keys": pages}, by_ids, [], {}, "expected arguments (ids): missing a required argument"),
    ({"keys": pages}, by_ids, [[1], 2], {}, "expected arguments (ids): too many positional"),
    ({"keys": pages}, by_rows, [[[1, 2.5], [1, 2.5]], "week"], {}, [[(1, 2.5)], "week"]),
    ({"keys": pages}, by_rows, [[[1, "x"]]], {}, "argument rows[0][1]: expected a valid number"),
    ({"keys": pages}, by_rows, [[[1, 2.5]], 7], {}, "argument unit: expected a valid string, got"),
    ({"keys": pages}, by_any_rows, [[[1, None, "x", True]]], {}, [[[1, None, "x", True]]]),
    ({"keys": pages}, by_any_rows, [[[1], [True], [1.0]]], {}, [[[1], [True], [1.0]]]),
    ({"keys": pages}, by_any_rows, [[[1, "a"], [1, "b"], [1, "a"]]], {}, [[[1, "a"], [1, "b"]]]),
    ({"keys": pages}, by_rows, [[[]]], {}, "expected rows such as [3615, 12.5], got: []"),
    ({"keys": pages}, by_rows, [[7]], {}, "expected rows such as [3615, 12.5], got: 7"),
    ({"keys": pages}, by_rows, [[[1, [2]]]], {}, "expected rows of plain values, got: [1, [2]]"),
    ({"keys": pages}, by_rows, [[[1]] * 1001], {}, "expected at most 1000 rows, got: 1001"),
    (
        {"keys": pages},
        by_rows,
        [],
        {"rows": [[1, 2]]},
        "expected the chunk as the first",
    ),
    (
        {},
        with_anything,
        [["a"]],
        {"times": 3},
        "argument name: expected a valid string, got: ['a']",
    ),
    ({}, with_anything, ["a"], {"times": 3}, ["a"]),
    ({}, with_anything, ["a", 3], {}, "expected arguments (name, *, times=1): too many positional"),
    ({}, with_anything, ["a"], {"time": 3}, "got an unexpected keyword argument 'time'"),
]


@pytest.mark.parametrize(("options", "function", "args", "kwargs", "expected"), ARGUMENTS)
def test_arguments_are_held_against_the_function(
    options: dict[str, Any],
    function: Callable[..., Any],
    args: list[Any],
    kwargs: dict[str, Any],
    expected: Any,
) -> None:
    """Before it runs: half of a call is worse than none."""
    made: AnyTask = decorator(**options)(function)

    if isinstance(expected, list):
        assert made.checked(args, kwargs) == (expected, kwargs)
        sent = json.loads(json.dumps(expected))
        assert check_publishable(made.name, args, kwargs) == (made.name, sent, kwargs)
        return
    with pytest.raises(UsageError) as refusal:
        made.checked(args, kwargs)
    assert expected in str(refusal.value)
    with pytest.raises(UsageError, match=f"^task '{made.name}': "):
        check_publishable(made, args, kwargs)


def test_an_empty_chunk_is_not_published() -> None:
    """It would cost its way through RabbitMQ, and do nothing; one that comes is no mistake."""
    made = task(keys=pages)(by_ids)

    with pytest.raises(UsageError, match=r"^task 'by_ids': expected a chunk of 1 to 1000 ids or"):
        check_publishable(made, [[]], {})
    assert made.checked([[]], {}) == ([[]], {})


def test_a_task_that_this_process_does_not_know_is_published_as_it_is() -> None:
    assert check_publishable("elsewhere", [[0]], {}) == ("elsewhere", [[0]], {})

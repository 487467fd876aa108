"""Arguments are sent as JSON, and read by the types of the function's parameters, or refused."""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NewType
from uuid import UUID

import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    field_serializer,
)
from typing_extensions import TypedDict

from aioworker import Context
from aioworker.errors import UsageError
from aioworker.tasks.registry import check_publishable
from aioworker.tasks.task import AnyTask, Task

if TYPE_CHECKING:
    from nowhere import Moment  # type: ignore[import-not-found]

ShopId = NewType("ShopId", int)
Stars = Annotated[int, Field(ge=1, le=5)]
NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)
BIG = 2**70
ALIASES: dict[str, Any] = {}
if sys.version_info >= (3, 12):
    exec("type Count = int", ALIASES)


class Way(Enum):
    """Text."""

    UP = "up"


class Level(IntEnum):
    """A number."""

    LOW = 1


class Row(NamedTuple):
    """A row of a chunk."""

    shop: int
    stars: float


class Options(TypedDict):
    """A dictionary."""

    since: date


@dataclass
class Review:
    """A dataclass."""

    shop: int
    at: datetime


class Shop(BaseModel):
    """A model of pydantic's, inside of itself."""

    id: int
    parent: Shop | None = None


class Unknown:
    """What pydantic knows nothing of."""


def open_shop(shop: int) -> int:
    """Refuse a shop in a text of two lines."""
    if shop == 7:
        raise ValueError("shop 7\nis closed")
    return shop


def taking(annotation: Any, **options: Any) -> AnyTask:
    """Return a task whose one parameter is annotated so."""

    def function(it: object) -> None: ...

    function.__annotations__["it"] = annotation
    return Task("note", function, **options)


def taken(task: AnyTask, *args: Any, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Publish, and return what the function gets."""
    _name, sent, named = check_publishable(task, args, kwargs)
    return task.checked(sent, named)


def refusal(task: AnyTask, *args: Any, **kwargs: Any) -> str:
    """Return why a worker refuses a message, which is why it is not published."""
    with pytest.raises(UsageError) as at_the_worker:
        task.checked(args, kwargs)
    with pytest.raises(UsageError) as published:
        check_publishable(task, args, kwargs)
    words = str(at_the_worker.value)
    assert str(published.value) == f"task '{task.name}': {words}"
    return words


READ: list[tuple[Any, Any, Any, Any]] = [
    (int, BIG, BIG, BIG),
    (float, 1, 1, 1.0),
    (str, "é\0", "é\0", "é\0"),
    (bool, True, True, True),
    (int | None, None, None, None),
    (int | str, "1", "1", "1"),
    (datetime, NOON, "2026-11-29T12:00:00Z", NOON),
    (datetime, "2026-11-29T13:00+01:00", "2026-11-29T13:00+01:00", NOON),
    (date, NOON.date(), "2026-11-29", NOON.date()),
    (timedelta, timedelta(minutes=5), "PT5M", timedelta(minutes=5)),
    (Decimal, Decimal("1.50"), "1.50", Decimal("1.50")),
    (Decimal, 1.5, 1.5, Decimal("1.5")),
    (UUID, UUID(int=1), str(UUID(int=1)), UUID(int=1)),
    (bytes, b"ab", "ab", b"ab"),
    (Way, Way.UP, "up", Way.UP),
    (Level, Level.LOW, 1, Level.LOW),
    (Literal["up", "down"], "up", "up", "up"),
    (Stars, 5, 5, 5),
    (ShopId, ShopId(3), 3, 3),
    (tuple[int, str], (1, "a"), [1, "a"], (1, "a")),
    (set[int], {3}, [3], {3}),
    (dict[int, date], {1: NOON.date()}, {"1": "2026-11-29"}, {1: NOON.date()}),
    (Sequence[int], (1, 2), [1, 2], [1, 2]),
    (list[Row], [Row(1, 2.5), (3, 4)], [[1, 2.5], [3, 4]], [Row(1, 2.5), Row(3, 4.0)]),
    (Options, {"since": NOON.date()}, {"since": "2026-11-29"}, {"since": NOON.date()}),
    (Review, Review(3, NOON), {"shop": 3, "at": "2026-11-29T12:00:00Z"}, Review(3, NOON)),
    (Review, {"shop": 3, "at": NOON}, {"shop": 3, "at": "2026-11-29T12:00:00Z"}, Review(3, NOON)),
    (Shop, Shop(id=3), {"id": 3, "parent": None}, Shop(id=3)),
    (Shop, {"id": 3}, {"id": 3}, Shop(id=3)),
    (ALIASES.get("Count", int), 3, 3, 3),
]


@pytest.mark.parametrize(("annotation", "value", "sent", "got"), READ)
def test_an_argument_is_sent_as_json_and_arrives_as_its_type(
    annotation: Any, value: Any, sent: Any, got: Any
) -> None:
    task = taking(annotation)

    assert check_publishable(task, [value], {}) == ("note", [sent], {})
    [[found], _] = task.checked([sent], {})
    assert (found, type(found)) == (got, type(got))


REFUSED: list[tuple[Any, Any, str]] = [
    (int, "42", "it: expected a valid integer, got: '42'"),
    (int, True, "it: expected a valid integer, got: True"),
    (int, 1.0, "it: expected a valid integer, got: 1.0"),
    (int, None, "it: expected a valid integer, got: None"),
    (str, 42, "it: expected a valid string, got: 42"),
    (bool, 1, "it: expected a valid boolean, got: 1"),
    (datetime, 1795899780, "it: expected a valid datetime, got: 1795899780"),
    (datetime, "soon", "it: expected a valid datetime, input is too short, got: 'soon'"),
    (Way, "left", "it: expected 'up', got: 'left'"),
    (Literal["up", "down"], "left", "it: expected 'up' or 'down', got: 'left'"),
    (int | str, [1], "it: expected a valid integer or a valid string, got: [1]"),
    (Stars, 6, "it: expected less than or equal to 5, got: 6"),
    (Annotated[str, Field(max_length=3)], "long", "it: expected at most 3 characters, got: 'long'"),
    (ShopId, "3", "it: expected a valid integer, got: '3'"),
    (list[int], [1, 2, "x"], "it[2]: expected a valid integer, got: 'x'"),
    (list[Row], [[1, 2.5], [1, "x"]], "it[1][1]: expected a valid number, got: 'x'"),
    (list[Row], [[1]], "it[0][1]: field required, got: [1]"),
    (Review, {"shop": 3}, "it['at']: field required, got: {'shop': 3}"),
    (Review | int, {"shop": 3, "at": 1}, "it['Review']['at']: expected a valid datetime, got: 1"),
    (
        dict[str, Shop],
        {"a": {"id": 1, "parent": {"id": "2"}}},
        "it['a']['parent']['id']: expected a valid integer, got: '2'",
    ),
    (
        Annotated[int, AfterValidator(open_shop)],
        7,
        "it: value error, shop 7 is closed, got: 7",
    ),
    (Callable[[], None], "print", "it: expected callable, got: 'print'"),
]


@pytest.mark.parametrize(("annotation", "value", "line"), REFUSED)
def test_an_argument_of_another_type_is_refused_before_it_is_sent_and_before_a_run(
    annotation: Any, value: Any, line: str
) -> None:
    """Strictly, as JSON: nothing is guessed, and text is no number."""
    assert refusal(taking(annotation), value) == f"argument {line}"


def test_whatever_is_refused_the_error_is_one_short_line() -> None:
    many = Enum("Many", {f"WAY_{number}": f"way {number}" for number in range(1000)})  # type: ignore[misc]
    wrong: list[tuple[Any, Any]] = [(int, "x\n" * 1000), (many, "left"), (dict, [["y" * 99] * 99])]

    for annotation, value in wrong:
        words = refusal(taking(annotation), value)
        assert words.isprintable()
        assert len(words) < 500


@pytest.mark.parametrize(
    "annotation",
    [Any, Collection[int], Iterable[int], Unknown, "Nowhere", list["Nowhere"]],  # type: ignore[name-defined]  # noqa: F821
    ids=str,
)
def test_what_has_no_schema_is_not_checked(annotation: Any) -> None:
    """The function gets what JSON holds, and gets it as it always did."""
    values: list[Any] = [["x"], {"a": None}, "\ud800", [[[]]], 1.5]

    for value in values:
        assert taken(taking(annotation), value) == ([value], {})


def test_a_name_that_is_not_known_leaves_the_others_checked() -> None:
    """As of what a module imports for its type checker alone."""

    def note(ctx: Context, moment: Moment, number: int, since: date | None = None) -> None: ...

    task = Task("note", note)

    assert taken(task, ["x"], 1, since=NOON.date()) == ([["x"], 1, NOON.date()], {})
    assert refusal(task, "x", "1") == "argument number: expected a valid integer, got: '1'"


def test_a_type_may_stand_behind_the_function_that_takes_it() -> None:
    """As `from __future__ import annotations` and Python 3.14 allow."""
    module: dict[str, Any] = {}
    exec("def note(it: Later): ...", module)
    task = Task("note", module["note"])
    exec("Later = int", module)

    assert refusal(task, "1") == "argument it: expected a valid integer, got: '1'"


def test_a_function_inside_of_another_is_read_where_it_is_written() -> None:
    def note(number: int, since: date) -> None: ...

    task = Task("note", partial(note, 1))

    assert taken(task, NOON.date()) == ([NOON.date()], {})


def test_every_way_to_pass_an_argument_is_checked() -> None:
    def note(first: int, /, second: date, *more: date, third: int = 0, **named: date) -> None: ...

    task, day, text = Task("note", note), NOON.date(), "2026-11-29"

    assert task.checked([1, text, text], {}) == ([1, day, day], {})
    assert task.checked([1], {"second": text, "x": text}) == ([1, day], {"x": day})
    assert refusal(task, 1, text, text, "x").startswith("argument more[1]: expected a valid date")
    assert refusal(task, 1, second=2).startswith("argument second: expected a valid date")
    assert refusal(task, 1, text, third="3").startswith("argument third: expected a valid integer")
    assert refusal(task, 1, text, x=4).startswith("argument named['x']: expected a valid date")


def test_what_is_passed_by_its_name_is_sent_by_its_name() -> None:
    """The next version of the function may have its parameters in another order."""

    def note(first: int, second: date) -> None: ...

    sent = check_publishable(Task("note", note), [], {"second": NOON.date(), "first": 1})

    assert sent == ("note", [], {"second": "2026-11-29", "first": 1})


def test_a_default_is_nobodys_argument() -> None:
    def note(way: Way = "sideways") -> None: ...  # type: ignore[assignment]

    assert taken(Task("note", note)) == ([], {})


def test_a_task_that_is_called_is_the_function_itself() -> None:
    def double(number: int) -> int:
        return 2 * number

    assert Task("double", double)("4") == "44"  # type: ignore[arg-type,comparison-overlap]


@pytest.mark.parametrize(
    "value", [object(), {1: object()}, b"\xff"], ids=["object", "inside", "bytes"]
)
def test_what_json_cannot_hold_is_not_published(value: object) -> None:
    with pytest.raises(UsageError, match=r"^expected arguments that JSON can hold, got: "):
        check_publishable(taking(Any), [value], {})


@dataclass(frozen=True)
class Login:
    """A dataclass with a secret, which can be in a set."""

    name: str
    password: SecretStr


@dataclass
class Loose:
    """A dataclass that can be compared with nothing."""

    id: int

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError


class Account(BaseModel):
    """A model with a secret, under another name and deep inside."""

    logins: dict[str, tuple[SecretStr, ...]] = Field(alias="entries")


class Birthday(Secret[date]):
    """A secret that is masked in its own way."""

    def _display(self) -> str:
        return "****/**/**"


class Told(BaseModel):
    """A model whose JSON tells its secret, as pydantic's documentation shows."""

    password: SecretStr

    @field_serializer("password", when_used="json")
    def _tell(self, password: SecretStr) -> str:
        return password.get_secret_value()


class Tag(BaseModel, frozen=True):
    """What a set can hold."""

    id: int


class Tagged(BaseModel):
    """A model that pydantic makes JSON of, but no dictionary."""

    tags: set[Tag]


PASSWORD = SecretStr("pass")
MASKED = "SecretStr, of which JSON holds '**********'"
CHANGED: list[tuple[Any, str]] = [
    (PASSWORD, MASKED),
    (SecretBytes(b"pass"), "SecretBytes, of which JSON holds '**********'"),
    (Birthday(NOON.date()), "Birthday, of which JSON holds '****/**/**'"),
    (Login("a", PASSWORD), MASKED),
    ({Login("a", PASSWORD)}, MASKED),
    (Account(entries={"a": (PASSWORD,)}), MASKED),
    (RootModel[SecretStr](PASSWORD), MASKED),
    ([1, ({"a": deque([PASSWORD])},)], MASKED),
    ({PASSWORD: 1}, MASKED),
    ([(number, NOON) for number in range(3)] + [(4, PASSWORD)], MASKED),
    ({1: "a", "1": "b"}, "dict, of which JSON holds {'1': 'b'}"),
    (re.compile("a", re.IGNORECASE), "Pattern, of which JSON holds 'a'"),
    ((number for number in (1, 2)), "generator, of which JSON holds [1, 2]"),
]


@pytest.mark.parametrize(("value", "words"), CHANGED, ids=[words for _value, words in CHANGED])
def test_what_json_holds_as_another_value_is_not_published(value: Any, words: str) -> None:
    """A worker would get `**********` for a password, and nobody would know."""
    expected = (
        f"expected arguments that JSON can hold, got: {words}: publish text, numbers or lists, or"
        " an id to look it up by"
    )
    calls: list[tuple[Any, list[Any], dict[str, Any]]] = [
        (taking(Any), [value], {}),
        ("elsewhere", [1, value], {}),
        ("elsewhere", [], {"it": value}),
    ]

    for task, args, named in calls[: 1 if isinstance(value, Iterator) else None]:
        with pytest.raises(UsageError) as refused:
            check_publishable(task, args, named)
        assert str(refused.value) == expected


def test_a_type_that_masks_its_value_is_read_from_text() -> None:
    """It is the sender's to tell a secret; the function's `SecretStr` keeps it out of logs."""
    assert taken(taking(SecretStr), "pass") == ([PASSWORD], {})
    assert check_publishable("elsewhere", [Told(password=PASSWORD)], {}) == (
        "elsewhere",
        [{"password": "pass"}],
        {},
    )


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("**********", "**********"),
        (SecretStr(""), ""),
        ({1: "a", 2: "b"}, {"1": "a", "2": "b"}),
        ([(1, "a"), (2, None)], [[1, "a"], [2, None]]),
        (re.compile("a"), "a"),
        (Path("a"), "a"),
        (Loose(1), {"id": 1}),
        (Tagged(tags={Tag(id=1)}), {"tags": [{"id": 1}]}),
    ],
    ids=repr,
)
def test_what_json_holds_whole_is_published(value: Any, sent: Any) -> None:
    assert check_publishable("elsewhere", [value, NOON], {})[1][0] == sent


def test_half_a_character_is_no_text() -> None:
    """JSON can say it, and no database takes it."""
    words = refusal(taking(str), "\ud800")

    assert words.startswith("expected arguments that JSON can hold, got: ")


def test_a_number_that_json_has_not_but_python_reads_is_a_float() -> None:
    [[found], _] = taking(float).checked([float("nan")], {})

    assert isnan(found)


def sweep() -> Iterator[list[Any]]:
    yield []


@pytest.mark.parametrize(
    "annotation",
    [list[int], tuple[int, ...], Sequence[ShopId], Iterable[int], Collection[int], list],
    ids=str,
)
def test_a_chunk_is_a_list_of_ids_whatever_it_is_annotated(annotation: Any) -> None:
    """What is needed of it is a list, too."""
    task = taking(annotation, keys=sweep)

    assert taken(task, ([7], 5, 7)) == ([[7, 5]], {})
    for wrong in (0, True, "7", [True], [7, 8], 2**63):
        assert refusal(task, [7, wrong]) == (
            f"expected ids from 1 to 9223372036854775807, got: {wrong!r}"
        )


def test_an_id_can_be_limited_by_its_type() -> None:
    task = taking(list[Stars], keys=sweep)

    assert taken(task, [1, [5]]) == ([[1, 5]], {})
    assert refusal(task, [1, [6]]) == "argument it[1]: expected less than or equal to 5, got: 6"


async def test_rows_arrive_as_their_types_and_are_asked_for_so() -> None:
    async def rate(rows: list[tuple[int, date]]) -> None: ...

    asked: list[Any] = []

    async def reader(rows: list[tuple[int, date]]) -> list[tuple[int, date]]:
        asked.extend(rows)
        return rows[1:]

    task, day = Task("rate", rate), NOON.date()
    task.needed(reader)

    sent = check_publishable(task, [[(1, day), (2, day), [1, day]]], {})
    assert sent == ("rate", [[[1, "2026-11-29"], [2, "2026-11-29"]]], {})
    [[chunk], _] = task.checked(sent[1], sent[2])
    needed = await task.read_needed(Context(None, "rate"), chunk)  # type: ignore[arg-type]

    assert chunk == asked == [(1, day), (2, day)]
    assert needed == [(2, day)]


def test_rows_that_differ_in_their_types_alone_are_several() -> None:
    task = taking(list[Any], keys=sweep)

    assert taken(task, [[1], [1.0], [True], [1]]) == ([[[1], [1.0], [True]]], {})

"""A chunk's annotation says whether it is one of ids or of rows, or that it is neither."""

from __future__ import annotations

import collections.abc
import sys
import typing
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, NamedTuple, NewType, TypeAlias

import pytest
from pydantic import AfterValidator

from aioworker.errors import TaskError, UsageError
from aioworker.producer import Producer, handing_to
from aioworker.tasks.signature import Signature, plain
from aioworker.tasks.task import Task

ShopId = NewType("ShopId", int)
Shops: TypeAlias = list[ShopId]


class Stars(NamedTuple):
    """A row, as a user may write it."""

    shop: int
    stars: float


ALIASES: dict[str, Any] = {}
if sys.version_info >= (3, 12):
    exec(
        "type Ids = list[int]\n"
        "type Pair = tuple[int, str]\n"
        "type Many[T] = list[T]\n"
        "type Lost = list[Nowhere]\n",
        ALIASES,
    )


def takes_ids(annotation: Any) -> bool:
    """Whether a task whose chunk is annotated so takes ids; otherwise it takes rows."""

    def function(chunk: object) -> None: ...

    function.__annotations__["chunk"] = annotation
    signature = Signature.of("task", function)
    signature.expect_chunk("keys")
    return signature.takes_ids


@pytest.mark.parametrize(
    "annotation",
    [
        list,
        list[int],
        Sequence[int],
        Iterable[int],
        Collection[int],
        tuple[int, ...],
        typing.List,  # noqa: UP006 - as many modules have it
        Shops,
        NewType("ShopIds", list[int]),
        Annotated[list[Annotated[int, "of a shop"]], "a chunk"],
        list[int] | None,
        list[int] | tuple[int, ...],
        "list[int]",
        "collections.abc.Sequence[int]",
        "unknown.Sequence[int]",
    ],
    ids=str,
)
def test_a_list_of_ids_by_any_name_is_one(annotation: Any) -> None:
    assert takes_ids(annotation)


@pytest.mark.parametrize(
    "annotation",
    [
        list[tuple[int, float]],
        list[list[int]],
        Sequence[Sequence[Any]],
        list[Any],
        list[Stars],
        list[tuple[int, str] | tuple[int, None]],
        list["Nowhere"],  # type: ignore[name-defined]  # noqa: F821
        "list[Nowhere]",
        "Nowhere",
    ],
    ids=str,
)
def test_a_list_of_rows_or_of_what_cannot_be_told_is_one_of_rows(annotation: Any) -> None:
    assert not takes_ids(annotation)


@pytest.mark.parametrize(
    "annotation",
    [
        *(int, str, set[int], frozenset[int], dict[int, int]),
        *(list[str], list[bool], list[float], list[dict[str, int]]),
        collections.abc.Iterator[int],
    ],
    ids=str,
)
def test_what_no_chunk_can_be_is_neither(annotation: Any) -> None:
    with pytest.raises(TaskError, match=r"^task 'task': expected its chunk annotated as ids, list"):
        takes_ids(annotation)


@pytest.mark.skipif(not ALIASES, reason="the statement `type` came with Python 3.12")
def test_an_alias_is_what_stands_behind_it() -> None:
    many, pair = ALIASES["Many"], ALIASES["Pair"]

    assert takes_ids(ALIASES["Ids"])
    assert [takes_ids(many[one]) for one in (int, pair)] == [True, False]
    with pytest.raises(TaskError):
        takes_ids(many[str])


@pytest.mark.skipif(not ALIASES, reason="the statement `type` came with Python 3.12")
def test_an_alias_that_cannot_be_resolved_is_left_alone() -> None:
    lost = ALIASES["Lost"]

    assert plain(lost) is lost
    assert takes_ids(lost)
    assert not takes_ids(ALIASES["Many"][lost])


async def test_a_sweep_publishes_no_id_that_json_cannot_hold() -> None:
    async def refresh(ids: list[Annotated[int, AfterValidator(lambda _: float("nan"))]]) -> None:
        pass

    task = Task("shop", refresh, keys=lambda: [])
    [chunk], _named = task.checked([[1, 2]], {})

    with handing_to(lambda *_: None), pytest.raises(UsageError, match="that JSON can hold"):
        await Producer.over([], 1, "aioworker").publish_swept(task, chunk, "a sweep")

"""A chunk's annotation says whether it is one of ids or of rows, or that it is neither."""

from __future__ import annotations

import collections.abc
import sys
import typing
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, NamedTuple, NewType, TypeAlias

import pytest

from aioworker.tasks.hints import IDS, ROWS, behind, chunk_of

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
    ],
    ids=str,
)
def test_a_list_of_ids_by_any_name_is_one(annotation: Any) -> None:
    assert chunk_of(annotation) == IDS


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
    assert chunk_of(annotation) == ROWS


@pytest.mark.parametrize(
    "annotation",
    [
        *(int, str, Any, object, set[int], frozenset[int], dict[int, int]),
        *(list[str], list[bool], list[float], list[dict[str, int]], list[int | None]),
        *(tuple[int, int], list[int] | int, list[int] | list[tuple[int, str]]),
        collections.abc.Iterator[int],
    ],
    ids=str,
)
def test_what_no_chunk_can_be_is_neither(annotation: Any) -> None:
    assert chunk_of(annotation) is None


@pytest.mark.skipif(not ALIASES, reason="the statement `type` came with Python 3.12")
def test_an_alias_is_what_stands_behind_it() -> None:
    many, pair = ALIASES["Many"], ALIASES["Pair"]

    assert chunk_of(ALIASES["Ids"]) == IDS
    assert [chunk_of(many[one]) for one in (int, pair, str)] == [IDS, ROWS, None]


@pytest.mark.skipif(not ALIASES, reason="the statement `type` came with Python 3.12")
def test_an_alias_that_cannot_be_resolved_is_left_alone() -> None:
    lost = ALIASES["Lost"]

    assert behind(lost) is lost
    assert chunk_of(lost) == chunk_of(ALIASES["Many"][lost]) == ROWS

"""Chunks: up to 1000 ids, or rows of JSON values, in one message."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from aioworker.errors import UsageError
from aioworker.rabbitmq.message import brief

CHUNK_LIMIT = 1000
LARGEST_ID = 2**63 - 1
_NESTED = {list, dict}  # what a row of JSON can hold that is no plain value


def check_ids(chunk: object, largest: int = LARGEST_ID) -> list[int]:
    """Return the ids of a chunk, each once, in their order.

    Args:
        chunk: A list of up to 1000 entries, each an id or a row of one id (`[3615]`).
        largest: The largest id.

    Raises:
        UsageError: It is anything else.
    """
    ids = _check_length(chunk, "ids")
    # What is right is seen at once, by built-ins; what may be wrong, one by one.
    if set(map(type, ids)) != {int} or min(ids) < 1 or max(ids) > largest:
        ids = [_check_id(entry, largest) for entry in ids]
    return ids if len(set(ids)) == len(ids) else list(dict.fromkeys(ids))


def _check_id(entry: object, largest: int) -> int:
    value = entry[0] if isinstance(entry, list) and len(entry) == 1 else entry
    # A bool is an int to Python, and True would be add-on 1.
    if type(value) is not int or not 1 <= value <= largest:
        raise UsageError(f"expected ids from 1 to {largest}, got: {brief(entry)}")
    return value


def check_rows(chunk: object) -> list[Any]:
    """Return the rows of a chunk, each once, in their order.

    Args:
        chunk: A list of up to 1000 rows, each a list or tuple of at least one value: text,
            a number, a bool or null.

    Raises:
        UsageError: It is anything else.
    """
    rows = _check_length(chunk, "rows")
    for row in rows:
        if not isinstance(row, list | tuple) or not row:
            raise UsageError(
                f"expected rows such as [3615, 12.5], got: {brief(row)}; a chunk of ids is"
                " annotated list[int]"
            )
    if _NESTED & set(map(type, chain.from_iterable(rows))):
        row = next(row for row in rows if _NESTED & set(map(type, row)))
        raise UsageError(f"expected rows of plain values, got: {brief(row)}")
    if len({row[0] for row in rows}) < len(rows):
        # By their types too: 1, 1.0 and True are equal.
        rows = list({(*row, *map(type, row)): row for row in rows}.values())
    return rows


def _check_length(chunk: object, what: str) -> list[Any]:
    if not isinstance(chunk, list | tuple):
        raise UsageError(f"expected a list of {what}, got: {brief(chunk)}")
    if len(chunk) > CHUNK_LIMIT:
        raise UsageError(f"expected at most {CHUNK_LIMIT} {what}, got: {len(chunk)}")
    return list(chunk)


def part_of(chunk: list[Any], found: Iterable[Any]) -> list[Any]:
    """Return the entries of a chunk that were found, each once, in the chunk's order.

    Args:
        chunk: Ids or rows.
        found: Some of them; a row may be a tuple.

    Raises:
        UsageError: Something else was found.
    """
    known = {_key(entry): entry for entry in chunk}
    kept = set()
    for entry in found:
        try:
            key = _key(entry)
            known[key]
        except BaseException:  # noqa: BLE001 - whatever code of its own an object runs as a key
            raise UsageError(f"expected a part of the chunk, got: {brief(entry)}") from None
        kept.add(key)
    return [entry for key, entry in known.items() if key in kept]


def _key(entry: Any) -> Any:
    return tuple(entry) if isinstance(entry, list) else entry


def id_of(entry: Any) -> Any:
    """Return an entry's id: a row begins with it."""
    return entry[0] if isinstance(entry, list | tuple) else entry

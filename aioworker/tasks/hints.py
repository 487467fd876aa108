"""What an annotation means: the type behind its other names, a chunk of ids or of rows."""

from __future__ import annotations

import inspect
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, TypeVar, Union, get_args, get_origin

IDS, ROWS = "ids", "rows"
_UNIONS = (Union, UnionType)
# Of annotations that cannot be resolved; any other text is taken for rows.
_IDS_AS_TEXT = frozenset({"", "list", "list[int]", "List[int]", "Sequence[int]", "Iterable[int]"})


def behind(annotation: Any) -> Any:
    """Return the type behind `type X = …`, `NewType` and `Annotated`, as far as it can be told."""
    found = annotation
    try:
        while True:
            if get_origin(found) is Annotated:
                found = get_args(found)[0]
            elif hasattr(found, "__supertype__"):
                found = found.__supertype__
            elif hasattr(found, "__value__"):
                given = get_args(found)
                found = found.__value__[given] if given else found.__value__
            else:
                return found
    except Exception:  # noqa: BLE001 - whatever evaluating somebody's annotations may raise
        return annotation


def chunk_of(annotation: Any) -> str | None:
    """Return what a parameter annotated so takes a chunk of: `IDS`, `ROWS`; None of neither.

    Rows, too, are what cannot be told.
    """
    found = behind(annotation)
    if found is inspect.Parameter.empty or found is list:
        return IDS
    if isinstance(found, str):
        bare = found.rpartition("typing.")[2].rpartition("collections.abc.")[2]
        return IDS if bare in _IDS_AS_TEXT else ROWS
    if _cannot_be_told(found):
        return ROWS
    kind, entries = get_origin(found), get_args(found)
    if kind in _UNIONS:
        return _one_of([chunk_of(one) for one in entries if one is not NoneType])
    if kind is not tuple and not _takes_lists(kind):
        return None
    if kind is tuple and entries[1:] not in ((), (...,)):
        return None
    return _entry_of(entries[0]) if entries else IDS


def _entry_of(annotation: Any) -> str | None:
    found = behind(annotation)
    if found is int:
        return IDS
    if found is Any or isinstance(found, str) or _cannot_be_told(found):
        return ROWS
    kind = get_origin(found) or found
    if kind in _UNIONS:
        return _one_of([_entry_of(one) for one in get_args(found)])
    named = isinstance(kind, type) and issubclass(kind, tuple | list)
    return ROWS if named or _takes_lists(kind) else None


def _cannot_be_told(found: Any) -> bool:
    alias = type(get_origin(found) or found).__name__ == "TypeAliasType"  # of Python 3.12
    return alias or isinstance(found, ForwardRef | TypeVar)


def _one_of(kinds: list[str | None]) -> str | None:
    return kinds[0] if len(set(kinds)) == 1 else None


def _takes_lists(kind: Any) -> bool:
    """Whether a list is one of these."""
    try:
        return isinstance(kind, type) and issubclass(list, kind)
    except TypeError:  # a protocol that cannot be asked
        return True

"""Messages that nobody should publish, drawn at random, each with what its reason begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aio_pika
import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pamqp.commands import Basic

from aioworker.rabbitmq.message import retries
from tests.conftest import TASK

ADDONS = [1001, 1002, 1003]  # what they name: nothing may ever write these
RIGHT = json.dumps([[ADDONS], {}, None]).encode()
DEEPEST = 20_000
LARGE_BYTES = 10_000_000
TABLE_BYTES = 100_000
# Each of these has a meaning, to aioworker or to RabbitMQ.
TAKEN = {"task", "retries", "eta", "expires", "timelimit", "compression", "CC", "BCC"}
NEAR = ["id", "x-death", "x-delivery-count", "x-aioworker-reason", "x-aioworker-lane"]

NO_JSON = "expected a body of JSON in UTF-8, got: "
TOO_LARGE = "expected a body of at most 4194304 bytes, got: "
NO_MESSAGE = "expected body [args, kwargs, embed], got: "
NO_ARGUMENTS = "expected arguments (ids): "


@dataclass(frozen=True, slots=True)
class Bad:
    """A message that is to be refused.

    Args:
        reason: What its reason begins with: one of these.
        body: Its body.
        headers: Its headers.
        content_type: Its content type.
        nameless: Whether it comes without a property `message_id`, which aiormq always adds.
    """

    reason: tuple[str, ...]
    body: bytes = RIGHT
    headers: dict[str, Any] = field(default_factory=lambda: {"task": TASK})
    content_type: str | None = None
    nameless: bool = False


class Latin(str):
    """Text that goes out in Latin-1, where AMQP expects UTF-8."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        """Return it as an old producer would write it."""
        return super().encode("latin-1")


class Properties(Basic.Properties):
    """Properties that go out as they are given, in bytes."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()
        self._encoded = encoded

    def marshal(self) -> bytes:
        """Return them."""
        return self._encoded


class NamelessProperties(Basic.Properties):
    """Properties that go out without a `message_id`."""

    def marshal(self) -> bytes:
        """Return the others."""
        self.message_id = None
        return super().marshal()


class Nameless(aio_pika.Message):
    """A message as other clients send it: aiormq names each of its own."""

    @property
    def properties(self) -> Basic.Properties:
        """What goes out."""
        found = NamelessProperties()
        for name in Basic.Properties.__slots__:
            setattr(found, name, getattr(super().properties, name))
        return found


def _table(name: bytes, value: bytes) -> bytes:
    """Encode a table of one entry."""
    entry = bytes([len(name)]) + name + value
    return len(entry).to_bytes(4) + entry


def _deep(levels: int) -> bytes:
    table = _table(b"", b"V")
    for _ in range(levels):
        table = _table(b"", b"F" + table)
    return table


_HEADERS, _TIMESTAMP, _MESSAGE_ID = b"\x20\x00", b"\x00\x40", b"\x00\x80"
# What RabbitMQ passes on and pamqp cannot decode, by what its error begins with.
UNDECODABLE = {
    "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9": _HEADERS
    + _table("\xe9t\xe9".encode("latin-1"), b"V"),
    "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff": _MESSAGE_ID + b"\x01\xff",
    "ValueError: year": _TIMESTAMP + (1_600_000_000_000_000).to_bytes(8),
    "RecursionError: maximum recursion": _HEADERS + _deep(2000),
}

# Values, in headers and in bodies.

_names = st.text(max_size=20)
_in_headers = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
    | st.binary().map(bytearray)
    | st.binary().map(lambda drawn: Latin(drawn.decode("latin-1")))
    | st.integers(0, 2**32 - 1).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=5,
)
_in_bodies = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=40)
    | st.sampled_from([0, -1, 2**32, 10**400, "1); DROP TABLE addons; --", "\r\n\x1b[2J\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=5,
)


def _but(values: SearchStrategy[Any], right: Callable[[Any], bool]) -> SearchStrategy[Any]:
    return values.filter(lambda value: not right(value))


def _is_id(value: object) -> bool:
    """Whether it is an id, or a row of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return type(value) is int and 1 <= value < 2**32


def _is_message(value: object) -> bool:
    """Whether it may be a message's body, by its form."""
    return isinstance(value, list) and len(value) == 3


def _can_be_message(body: bytes) -> bool:
    try:
        return _is_message(json.loads(body))
    except ValueError:
        return False


def _is_count(value: object) -> bool:
    """Whether it may say how often a message was tried; nothing says never."""
    return retries({"retries": _on_arrival(value)}) is not None


def _says_nothing(value: object) -> bool:
    """Whether a header is as good as none: null, 0, false, nothing in it."""
    return retries({"retries": _on_arrival(value)}) == 0


def _on_arrival(value: object) -> object:
    """Return a header's value as it is decoded: text is text, whatever class encoded it."""
    return str(value) if isinstance(value, str) else value


def _is_mapping(value: object) -> bool:
    """Whether it may be a body's keyword arguments: PHP writes none as an empty list."""
    return isinstance(value, dict) or value in (None, [])


# Bodies.


def _encode(args: object, kwargs: object, embed: object) -> bytes:
    return json.dumps([args, kwargs, embed]).encode()


def _nest(opening: str, depth: int, closing: str) -> bytes:
    return (opening * depth + closing * depth).encode()


def _with_entry(wrong: object, place: int) -> bytes:
    return _encode([[*ADDONS[:place], wrong, *ADDONS[place:]]], {}, None)


_no_ids = _but(_in_bodies, lambda value: isinstance(value, list))
_some = st.dictionaries(_names, _in_bodies, min_size=1, max_size=5)
_passed_on = st.sampled_from(["callbacks", "errbacks", "chain", "chord"]) | _names
_bodies: dict[tuple[str, ...], SearchStrategy[bytes]] = {
    (NO_JSON,): st.integers(0, len(RIGHT) - 1).map(lambda end: RIGHT[:end])
    | st.builds(_nest, st.sampled_from(["[", "[[[", '{"a":']), st.integers(1, DEEPEST), st.just(""))
    | st.integers(4301, DEEPEST).map(lambda digits: RIGHT.replace(b"1002", b"9" * digits)),
    (NO_JSON, NO_MESSAGE): _but(st.binary(max_size=2000), _can_be_message)
    | st.builds(_nest, st.just("["), st.integers(1, DEEPEST), st.just("]")),
    (NO_MESSAGE, NO_ARGUMENTS): st.builds(
        _encode,
        _but(_in_bodies, lambda v: isinstance(v, list) and len(v) == 1),
        st.just({}),
        st.none(),
    ),
    (NO_MESSAGE,): _but(_in_bodies, _is_message).map(lambda value: json.dumps(value).encode())
    | st.builds(_encode, st.just([ADDONS]), _but(_in_bodies, _is_mapping), st.none())
    | st.builds(
        _encode,
        st.just([ADDONS]),
        st.just({}),
        _but(_in_bodies, _is_mapping),
    ),
    (NO_ARGUMENTS,): st.builds(_encode, st.just([ADDONS]), _some, st.none()),
    ("expected no ", "expected nothing in embed but "): st.builds(
        _encode,
        st.just([ADDONS]),
        st.just({}),
        st.dictionaries(_passed_on, _in_bodies.filter(bool), min_size=1),
    ),
    ("expected a list of ids, got: ",): st.builds(
        _encode, st.tuples(_no_ids), st.just({}), st.none()
    ),
    ("expected ids from 1 to 4294967295, got: ",): st.builds(
        _with_entry, _but(_in_bodies, _is_id), st.integers(0, 3)
    ),
    ("expected at most 1000 ids, got: ",): st.integers(1001, 5000).map(
        lambda count: _encode([[ADDONS[0]] * count], {}, None)
    ),
}

# Headers.

_headers: dict[tuple[str, ...], SearchStrategy[dict[str, Any]]] = {
    (f"expected header task {TASK!r}, got: ",): st.fixed_dictionaries(
        {"task": _in_headers | st.sampled_from([f"{TASK} ", TASK.upper(), f"{TASK}\n"])}
    ),
    ("expected header retries from 0 to 1000, got: ",): st.fixed_dictionaries(
        {"retries": _but(_in_headers, _is_count) | st.sampled_from([-1, 1001, "-1", 1.5])}
    ),
    ("expected no eta or countdown: ",): st.fixed_dictionaries(
        {"eta": _but(_in_headers, _says_nothing) | st.just("2038-01-19T03:14:07+00:00")}
    ),
    ("expected header expires in ISO 8601, or in seconds since 1970, got: ",): (
        st.fixed_dictionaries(
            {
                "expires": _but(
                    _in_headers, lambda v: isinstance(v, datetime | str | int | float) or not v
                )
            }
        )
    ),
    ("expected header timelimit as [seconds, seconds], got: ",): st.fixed_dictionaries(
        {
            "timelimit": _but(st.text() | st.integers(-(2**31), 2**31), _says_nothing)
            | st.sampled_from([[-1, None], [None, "one"], {"0": "one"}])
        }
    ),
    ("expected compression application/x-gzip, got: ",): st.fixed_dictionaries(
        {"compression": _but(_in_headers, _says_nothing) | st.just("application/x-bz2")}
    ),
}
_beside = st.dictionaries(
    _but(st.sampled_from(NEAR) | _names, TAKEN.__contains__), _in_headers, max_size=2
)
_right = st.just(RIGHT)
_none: SearchStrategy[dict[str, Any]] = st.just({})
_usual = st.none() | st.just("application/json")


def _bad(
    reasons: tuple[str, ...],
    bodies: SearchStrategy[bytes] = _right,
    headers: SearchStrategy[dict[str, Any]] = _none,
    content_types: SearchStrategy[str | None] = _usual,
) -> SearchStrategy[Bad]:
    all_headers = st.builds(lambda one, other: {"task": TASK} | one | other, _beside, headers)
    return st.builds(Bad, st.just(reasons), bodies, all_headers, content_types, st.booleans())


_messages = st.one_of(
    *(_bad(reasons, bodies) for reasons, bodies in _bodies.items()),
    *(_bad(reasons, headers=headers) for reasons, headers in _headers.items()),
    _bad(
        ("expected content type application/json, got: ",),
        content_types=_but(st.text(min_size=1, max_size=60), lambda v: "json" in v.lower()),
    ),
)


def draw(seed: int, count: int) -> list[Bad]:
    """Return so many of them, the same ones for the same seed."""
    drawn: list[Bad] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        deadline=None,
    )
    @hypothesis.given(_messages)
    def collect(message: Bad) -> None:
        drawn.append(message)

    collect()
    return drawn


def large() -> list[Bad]:
    """Return those with a body of ten megabytes."""
    text = "x" * LARGE_BYTES
    rows = ("[[[" + "[]," * (LARGE_BYTES // 3) + "[]]], {}, null]").encode()
    return [
        Bad((TOO_LARGE,), body)
        for body in (
            b"[" * LARGE_BYTES,
            b"\xff" * LARGE_BYTES,
            b"9" * LARGE_BYTES,
            b" " * LARGE_BYTES,
            json.dumps(text).encode(),
            _with_entry(text, 1),
            _encode([ADDONS], {text: 1}, None),
            rows,
        )
    ]


def wide() -> list[Bad]:
    """Return those with a hundred kilobytes of headers."""
    tables: list[dict[str, Any]] = [
        {"one": "x" * TABLE_BYTES},
        {"bytes": bytearray(TABLE_BYTES)},
        {"Latin-1": Latin("\xff" * TABLE_BYTES)},
        {"list": [None] * TABLE_BYTES},
        {"many": {f"{n:04}": n for n in range(TABLE_BYTES // 10)}},
        {f"{n:04}": n for n in range(TABLE_BYTES // 10)},
        {"id": "x" * TABLE_BYTES},
        {"id": "\u6ce8" * 100},
        {"x-aioworker-first-failed-at": "x" * 130_900},
    ]
    return [
        Bad((NO_JSON,), b"no JSON", {"task": TASK} | table, nameless=nameless)
        for table in tables
        for nameless in (False, True)
    ]

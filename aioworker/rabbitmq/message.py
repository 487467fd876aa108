"""What is on the wire: Celery's task message protocol 2, as JSON.

A Celery producer can publish what is read here, and a Celery worker can run what is
written here. The protocol is described in Celery's documentation, "Message Protocol".
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import socket
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from aioworker.errors import MessageRefusedError, UsageError, name_of

UNREADABLE = "x-aioworker-unreadable"  # in place of properties that cannot be decoded: why
PROPERTIES = "x-aioworker-properties"  # beside it: these, in hexadecimal digits
WITHHELD = "x-aioworker-withheld"  # in place of all properties: its body is too large to come
PUBLISHED = "x-aioworker-published-at"  # to the millisecond: AMQP's own timestamp has seconds
REASON = "x-aioworker-reason"  # why a copy lies where it does
TOGETHER = "x-aioworker-together"  # with how many it may run: more of them failed
LOOK = "x-aioworker-look"  # the look at the dead letters that has seen it
SWEEP = "x-aioworker-sweep"  # the sweep that a message belongs to
LONGEST_RUN_SECONDS = 1500  # RabbitMQ takes back what is not settled within half an hour
RETRIES_LIMIT = 1000
BODY_LIMIT = 4 * 1024 * 1024  # bytes; a thousand ids are eleven thousand
SMALL_BYTES = 128 * 1024  # of a body that may come over any channel
BRIEF_LENGTH = 200
_REPR = reprlib.Repr()
_REPR.maxstring = 80
CONTENT_TYPE = "application/json"
CONTENT_ENCODING = "utf-8"
# What UTF-8 is called: in part if it is ASCII, and by those who mean that nothing encodes it.
_ENCODINGS = {"utf-8", "utf8", "us-ascii", "ascii", "7bit", "8bit", "binary", "identity"}
_QUOTES = " \t'\""  # which some put around an encoding
# PHP writes a list for an empty mapping; others write null for either.
_EMPTY: tuple[object, ...] = (None, [], {})
_KINDS = (list, dict, dict)  # of a body: arguments, keyword arguments, what to do afterwards
_DIGITS = re.compile(r"[0-9]{1,20}(\.[0-9]{1,9})?")  # a number, of clients whose headers are text
_FIRST_EPOCH, _LAST_EPOCH = 10**9, 10**11  # seconds: the years 2001 to 5138
_EPOCH_UNITS = (1, 10**3, 10**6, 10**9)  # seconds, and milliseconds, as JavaScript counts, and less
_KOMBU_TYPE = '"__type__"'  # how kombu writes a date, a Decimal, a UUID, bytes
_GZIP = "application/x-gzip"  # kombu's name for what is zlib's format
ORIGIN = f"{os.getpid()}@{socket.gethostname()}"
# What a message asks of its worker after the run; aioworker keeps no results to pass on.
_AFTERWARDS = ("callbacks", "errbacks", "chain", "chord")


class Encoded(NamedTuple):
    """A message ready to be published: its id, headers and body, and when that is."""

    message_id: str
    headers: dict[str, Any]
    body: bytes
    published: datetime


class Call(NamedTuple):
    """What a message asks for.

    Args:
        args: Positional arguments of the task's function.
        kwargs: Its keyword arguments.
        expires: When it is too late to begin; None for never.
        time_limit: Seconds that the publisher grants a run; None leaves it to the worker.
        size: Bytes of the text that it was read from, unpacked.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    expires: datetime | None = None
    time_limit: float | None = None
    size: int = 0


def dump(content: object) -> bytes:
    """Return plain values as JSON.

    Raises:
        TypeError: One is none.
        ValueError: JSON has no such number.
    """
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def encode(
    task: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    sweep: str | None = None,
    dump: Callable[[object], bytes] = dump,
) -> Encoded:
    """Make the message that runs *task* with these arguments, published now.

    Args:
        task: The task's name.
        args: Positional arguments.
        kwargs: Keyword arguments.
        sweep: The id of the sweep that it belongs to; None of a single message.
        dump: Writes them as JSON.

    Raises:
        UsageError: An argument is nothing that JSON can hold.
    """
    message_id = str(uuid.uuid4())
    kwargs = dict(kwargs or {})
    try:
        body = dump([list(args), kwargs, dict.fromkeys(_AFTERWARDS)])
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"expected arguments that JSON can hold, got: {error}") from error
    if len(body) > BODY_LIMIT:
        raise UsageError(f"expected arguments of at most {BODY_LIMIT} bytes, got: {len(body)}")
    now = datetime.now(UTC)
    headers = {
        "lang": "py",
        "task": task,
        "id": message_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": message_id,
        "parent_id": None,
        "argsrepr": brief(list(args)),
        "kwargsrepr": brief(kwargs),
        "origin": ORIGIN,
        PUBLISHED: milliseconds(now),
    }
    if sweep is not None:
        headers[SWEEP] = sweep
    return Encoded(message_id, headers, body, now)


def decode(
    task: str,
    headers: Mapping[str, Any],
    content_type: str | None,
    body: bytes,
    content_encoding: str | None = None,
) -> Call:
    """Read a message whole, or refuse it whole.

    Args:
        task: The name of the task whose lane the message was taken from.
        headers: The message's headers.
        content_type: The message's content type; None counts as JSON.
        body: `[args, kwargs, embed]`.
        content_encoding: The message's content encoding; None counts as UTF-8.

    Raises:
        MessageRefusedError: Anything in it is not what aioworker can run.
    """
    if reason := unreadable(headers):
        raise MessageRefusedError(reason)
    if headers.get("task") != task:
        raise _unexpected(f"header task {task!r}", headers.get("task"))
    if content_type and not _is_json(content_type):
        raise _unexpected(f"content type {CONTENT_TYPE}", content_type)
    if content_encoding and not _is_text_of_json(content_encoding):
        raise _unexpected(f"content encoding {CONTENT_ENCODING}", content_encoding)
    if retries(headers) is None:
        raise _unexpected(f"header retries from 0 to {RETRIES_LIMIT}", headers["retries"])
    if not _says_nothing(headers.get("eta")):
        raise MessageRefusedError(
            "expected no eta or countdown: aioworker keeps no message for later"
        )
    unpacked = _unpacked(headers.get("compression"), body)
    args, kwargs = _read_body(unpacked)
    return Call(args, kwargs, _expires(headers), _time_limit(headers), len(unpacked))


def _unexpected(expected: str, found: object) -> MessageRefusedError:
    return MessageRefusedError(f"expected {expected}, got: {brief(found)}")


def unreadable(headers: Mapping[str, Any]) -> str:
    """Return why a message's properties could not be decoded; nothing where they could."""
    if UNREADABLE not in headers:
        return ""
    found = headers[UNREADABLE]
    plain = isinstance(found, str) and found.isprintable() and len(found) <= BRIEF_LENGTH
    return f"properties cannot be decoded: {found if plain else brief(found)}"


@lru_cache(maxsize=32)
def _is_json(content_type: str) -> bool:
    """Whether a content type is JSON's, in any spelling, in an encoding that is read."""
    # It takes 4 ms to import: who publishes, or reads a help, reads no content type.
    from email.message import Message

    parsed = Message()
    parsed["Content-Type"] = content_type
    named = parsed.get_param("charset") is not None
    charset = parsed.get_content_charset("unknown" if named else CONTENT_ENCODING)
    return parsed.get_content_type() == CONTENT_TYPE and _is_text_of_json(charset)


def _is_text_of_json(encoding: str) -> bool:
    return encoding.strip(_QUOTES).lower().replace("_", "-") in _ENCODINGS


def retries(headers: Mapping[str, Any]) -> int | None:
    """Return how often a message was tried before; None if its header does not tell."""
    found = headers.get("retries")
    number = _number(found or 0)
    if number is None or not 0 <= number <= RETRIES_LIMIT or not number.is_integer():
        return None
    return int(number)


def _says_nothing(found: Any) -> bool:
    """Whether a header is as good as none: PHP's clients write 0 or false for none."""
    return not found or _number(found) == 0


def _number(value: Any) -> float | None:
    """Return a header's number, which other languages' clients may have sent as text."""
    known = type(value) in (int, float, Decimal)
    return float(value) if known or (type(value) is str and _DIGITS.fullmatch(value)) else None


def _unpacked(compression: Any, body: bytes) -> bytes:
    if len(body) > BODY_LIMIT:
        raise _unexpected(f"a body of at most {BODY_LIMIT} bytes", len(body))
    if _says_nothing(compression):
        return body
    if compression != _GZIP:
        raise _unexpected(f"compression {_GZIP}", compression)
    unpacking = zlib.decompressobj()
    try:
        unpacked = unpacking.decompress(body, BODY_LIMIT)
    except zlib.error as error:
        raise MessageRefusedError(f"expected a body of {_GZIP}, got: {error}") from error
    if not unpacking.eof:
        raise MessageRefusedError(f"expected a whole body of up to {BODY_LIMIT} bytes unpacked")
    return unpacked


def _read_body(body: bytes) -> tuple[list[Any], dict[str, Any]]:
    try:
        # `json` would guess the encoding of bytes. Some put a mark before UTF-8.
        text = body.decode("utf-8-sig")
        # Only a body that may hold one is read with the slower hook.
        content = json.loads(text, object_hook=_plain if _KOMBU_TYPE in text else None)
    except MessageRefusedError:
        raise
    except (ValueError, RecursionError) as error:
        problem = str(error).partition("\n")[0][:200]
        raise MessageRefusedError(f"expected a body of JSON in UTF-8, got: {problem}") from error
    parts = content if isinstance(content, list) and len(content) == 3 else [content]
    match [kind() if part in _EMPTY else part for part, kind in zip(parts, _KINDS, strict=False)]:
        case [list() as args, dict() as kwargs, dict() as embed]:
            pass
        case _:
            raise _unexpected("body [args, kwargs, embed]", content)
    for name, value in embed.items():
        if value and name in _AFTERWARDS:
            raise MessageRefusedError(
                f"expected no {brief(name)}: aioworker keeps no results to pass on"
            )
        if value:
            raise _unexpected(f"nothing in embed but {', '.join(_AFTERWARDS)}", name)
    return args, kwargs


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    if "__type__" in found and "__value__" in found:
        raise MessageRefusedError(
            f"expected arguments of plain JSON, got kombu's {brief(found['__type__'])}"
        )
    return found


def _expires(headers: Mapping[str, Any]) -> datetime | None:
    found = headers.get("expires")
    if _says_nothing(found):
        return None
    try:
        return _moment(found)
    except (TypeError, ValueError, OverflowError):
        words = "header expires in ISO 8601, or in seconds since 1970"
        raise _unexpected(words, found) from None


def _moment(found: Any) -> datetime:
    """Return a moment in UTC, which is meant if no zone is named.

    A number is of seconds since 1970 or of a smaller unit: what is a moment from 2001 on in one
    of them is none in another. A small number may be a distance from a moment nobody knows.
    """
    number = _number(found) or 0.0
    for unit in _EPOCH_UNITS:
        if _FIRST_EPOCH <= number / unit < _LAST_EPOCH:
            return datetime.fromtimestamp(number / unit, UTC)
    moment = found if isinstance(found, datetime) else datetime.fromisoformat(found)
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _time_limit(headers: Mapping[str, Any]) -> float | None:
    """Return the shorter of the hard and the soft limit; to Celery, 0 is none."""
    limits = headers.get("timelimit")
    if _says_nothing(limits) or limits == [None, None]:
        return None
    if isinstance(limits, dict):  # a list of PHP's, sent as a table
        limits = list(limits.values())
    numbers = [_number(one or 0) for one in limits] if isinstance(limits, list | tuple) else [None]
    if not all(number is not None and number >= 0 for number in numbers):
        raise _unexpected("header timelimit as [seconds, seconds]", limits)
    return min((number for number in numbers if number), default=None)


def milliseconds(moment: datetime) -> str:
    """Return a moment as headers have it: ISO 8601, to the millisecond."""
    return moment.isoformat(timespec="milliseconds")


def moment(header: object) -> datetime | None:
    """Return a time in ISO 8601, UTC unless it says otherwise; None for what is none."""
    try:
        return aware(datetime.fromisoformat(header if isinstance(header, str) else ""))
    except ValueError:
        return None


def aware(time: datetime | None) -> datetime | None:
    """Return a time with its zone, UTC unless it has one."""
    return time if time is None or time.tzinfo else time.replace(tzinfo=UTC)


def brief(value: object) -> str:
    """Show a value from outside in one line, however large or odd it is."""
    try:
        shown = str.__str__(_REPR.repr(value))
    except BaseException as error:  # noqa: BLE001 - of a user's code, run by looking at it
        shown = f"<{name_of(value)}, whose own code raises {name_of(error)}>"
    return shown if len(shown) <= BRIEF_LENGTH else shown[:BRIEF_LENGTH] + "…"

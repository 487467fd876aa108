"""What is on the wire: Celery's task message protocol 2, as JSON.

A Celery producer can publish what is read here, and a Celery worker can run what is
written here. The protocol is described in Celery's documentation, "Message Protocol".
"""

from __future__ import annotations

import json
import os
import reprlib
import socket
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aioworker.errors import MessageRefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

CHUNK_LIMIT = 1000
ID_LIMIT = 2**32 - 1
RETRIES_LIMIT = 1000
BODY_LIMIT = 4 * 1024 * 1024  # bytes; a thousand ids are eleven thousand
BRIEF_LENGTH = 200
_REPR = reprlib.Repr()
_REPR.maxstring = 80
CONTENT_TYPE = "application/json"
CONTENT_ENCODING = "utf-8"
ORIGIN = f"{os.getpid()}@{socket.gethostname()}"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message ready to be published: its id, headers and body."""

    message_id: str
    headers: dict[str, Any]
    body: bytes


def check_chunk(ids: object) -> list[int]:
    """Return the ids of a chunk, each once, in their order.

    Args:
        ids: A list of up to 1000 entries, each an id or a row of one id (`[3615]`).

    Raises:
        UsageError: It is anything else.
    """
    if not isinstance(ids, list):
        raise UsageError(f"expected a list of ids, got: {_brief(ids)}")
    if len(ids) > CHUNK_LIMIT:
        raise UsageError(f"expected at most {CHUNK_LIMIT} ids, got: {len(ids)}")
    # What is right is seen at once, by built-ins; what may be wrong, one by one.
    if set(map(type, ids)) != {int} or min(ids) < 1 or max(ids) > ID_LIMIT:
        ids = list(map(_check_id, ids))
    return list(dict.fromkeys(ids))


def _check_id(entry: object) -> int:
    value = entry[0] if isinstance(entry, list) and len(entry) == 1 else entry
    # A bool is an int to Python, and True would be add-on 1.
    if type(value) is not int or not 1 <= value <= ID_LIMIT:
        raise UsageError(f"expected ids from 1 to {ID_LIMIT}, got: {_brief(entry)}")
    return value


def encode(task: str, ids: list[int]) -> Encoded:
    """Make the message that runs *task* for a chunk of *ids*."""
    message_id = str(uuid.uuid4())
    args = [ids]
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
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
        "argsrepr": f"[{_shown(ids)}]",
        "kwargsrepr": "{}",
        "origin": ORIGIN,
    }
    body = json.dumps([args, {}, embed], separators=(",", ":")).encode()
    return Encoded(message_id, headers, body)


def decode(
    task: str, headers: Mapping[str, Any], content_type: str | None, body: bytes
) -> list[int]:
    """Read a message whole and return its chunk of ids, or refuse it whole.

    Args:
        task: The name of the task whose lane the message was taken from.
        headers: The message's headers.
        content_type: The message's content type; None counts as JSON.
        body: `[args, kwargs, embed]`.

    Raises:
        MessageRefusedError: Anything in it is not what aioworker can run.
    """
    if headers.get("task") != task:
        raise MessageRefusedError(
            f"expected header task {task!r}, got: {_brief(headers.get('task'))}"
        )
    if content_type not in (None, CONTENT_TYPE):
        raise MessageRefusedError(
            f"expected content type {CONTENT_TYPE}, got: {_brief(content_type)}"
        )
    retries = headers.get("retries") or 0
    if type(retries) is not int or not 0 <= retries <= RETRIES_LIMIT:
        raise MessageRefusedError(
            f"expected header retries from 0 to {RETRIES_LIMIT}, got: {_brief(headers['retries'])}"
        )
    if headers.get("eta"):
        raise MessageRefusedError("expected no eta or countdown: aioworker runs what is due")
    return _read_chunk(body)


def _read_chunk(body: bytes) -> list[int]:
    if len(body) > BODY_LIMIT:
        raise MessageRefusedError(
            f"expected a body of at most {BODY_LIMIT} bytes, got: {len(body)}"
        )
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        problem = str(error).partition("\n")[0][:200]
        raise MessageRefusedError(f"expected a body of JSON, got: {problem}") from error
    match content:
        case [[ids], dict() as kwargs, (dict() | None) as embed]:
            pass
        case _:
            raise MessageRefusedError(f"expected body [[ids], {{}}, embed], got: {_brief(content)}")
    if kwargs:
        raise MessageRefusedError(f"expected no keyword arguments, got: {_brief(kwargs)}")
    for name, value in (embed or {}).items():
        if value:
            raise MessageRefusedError(
                f"expected no {_brief(name)}: aioworker keeps no results to pass on"
            )
    try:
        return check_chunk(ids)
    except UsageError as error:
        raise MessageRefusedError(str(error)) from error


def _shown(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 6 else f"[{ids[0]}, {ids[1]}, ..., {ids[-1]}]"


def _brief(value: object) -> str:
    """Show a value from outside in one line, however large or odd it is."""
    shown = _REPR.repr(value)
    return shown if len(shown) <= BRIEF_LENGTH else shown[:BRIEF_LENGTH] + "…"

"""What is on the wire, and what is refused."""

from __future__ import annotations

import json
import math
import zlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioworker.addons import update_current_version
from aioworker.errors import AioworkerError, MessageRefusedError, UsageError
from aioworker.rabbitmq.message import BODY_LIMIT, PUBLISHED, SWEEP, decode, encode, retries
from aioworker.tasks.chunk import check_ids

TASK = "update_current_version"
HEADERS = {"task": TASK, "id": "one"}


def body(ids: object) -> bytes:
    return json.dumps([[ids], {}, None]).encode()


def read(headers: dict[str, Any], content_type: str | None, content: bytes) -> list[int]:
    """Read a message as far as the main job's function."""
    call = decode(TASK, headers, content_type, content)
    [ids], _kwargs = update_current_version.checked(call.args, call.kwargs)
    return list(ids)


def test_a_chunk_arrives_as_it_was_published() -> None:
    encoded = encode(TASK, [[3615, 55]])

    assert read(encoded.headers, "application/json", encoded.body) == [3615, 55]


def test_a_message_is_one_of_celerys_protocol_2() -> None:
    """A Celery worker can run it: every header it reads is there."""
    encoded = encode(TASK, [[3615]])

    assert json.loads(encoded.body) == [
        [[3615]],
        {},
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
    ]
    varying = dict.fromkeys(("origin", "id", "root_id", PUBLISHED), "")
    assert encoded.headers | varying == {
        "lang": "py",
        "task": TASK,
        "id": "",
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": "",
        "parent_id": None,
        "argsrepr": "[[3615]]",
        "kwargsrepr": "{}",
        "origin": "",
        PUBLISHED: "",
    }
    assert encoded.headers["id"] == encoded.headers["root_id"] == encoded.message_id


def test_a_message_tells_when_it_was_published_and_by_which_sweep() -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)

    encoded = encode(TASK, [[3615]], sweep="autumn")

    noted = datetime.fromisoformat(encoded.headers[PUBLISHED])
    assert before <= noted <= datetime.now(UTC)
    assert encoded.published - noted < timedelta(milliseconds=1)
    assert encoded.headers[SWEEP] == "autumn"
    assert SWEEP not in encode(TASK, [[3615]]).headers


@pytest.mark.parametrize(
    "encoding",
    [
        None,
        "",
        "utf-8",
        "UTF-8",
        "UTF_8",
        " utf8 ",
        "'utf-8'",
        "us-ascii",
        "binary",
        "identity",
        "8bit",
        "7bit",
    ],
)
def test_json_by_any_of_its_encodings_is_read(encoding: str | None) -> None:
    call = decode(TASK, HEADERS, None, body([3615]), encoding)

    assert call.args == [[3615]]


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json; charset='utf-8'",
        "application/json; charset=us-ascii",
        "application/json; charset=utf8; profile=shop",
        " application/json ; Charset=UTF_8",
        "application/json;",
    ],
)
def test_json_in_any_spelling_is_taken(content_type: str | None) -> None:
    """Java, PHP, .NET and Node send what they send over HTTP, too."""
    assert read(HEADERS, content_type, body([3615])) == [3615]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=iso-8859-1",
        "application/json; charset=utf-16",
        "application/json; charset=",
        "application/json; charset=\xfctf-8",
        "application/json; charset*=utf-16''x",
        "application/jsonp",
        "application",
        "text/json",
        "text/plain; charset=utf-8",
        "application/json, text/plain",
        "application/x-python-serialize",
    ],
)
def test_another_type_or_charset_is_refused(content_type: str) -> None:
    with pytest.raises(MessageRefusedError) as refusal:
        read(HEADERS, content_type, body([3615]))

    shown = repr(content_type)
    assert str(refusal.value) == f"expected content type application/json, got: {shown}"


@given(st.text() | st.text().map("application/json;{}".format))
def test_a_content_type_is_json_or_not_whatever_it_is(content_type: str) -> None:
    with suppress(MessageRefusedError):
        read(HEADERS, content_type, body([1]))


@pytest.mark.parametrize(
    "content",
    [
        b"[[[1]], [], []]",
        b"[[[1]], [], {}]",
        b"[[[1]], null, null]",
        b'[[[1]], {}, {"callbacks": [], "errbacks": [], "chain": null, "chord": null}]',
    ],
)
def test_an_empty_list_is_an_empty_mapping(content: bytes) -> None:
    """PHP's json_encode writes `[]` for an array that holds nothing, whatever it might hold."""
    call = decode(TASK, HEADERS, None, content)

    assert (call.args, call.kwargs) == ([[1]], {})


@pytest.mark.parametrize("args", ["[]", "{}", "null"])
def test_an_empty_mapping_is_an_empty_list(args: str) -> None:
    """So a PHP client that casts its arguments to an object writes none."""
    call = decode(TASK, HEADERS, None, f'[{args}, {{"ids": [1]}}, null]'.encode())

    assert (call.args, call.kwargs) == ([], {"ids": [1]})


@pytest.mark.parametrize("content", [b'[{"0": [1]}, {}, null]', b"[[[1]], [1], null]", b'["",0,0]'])
def test_what_is_not_empty_is_not_turned_into_something_else(content: bytes) -> None:
    with pytest.raises(MessageRefusedError, match=r"^expected body \[args, kwargs, embed\], got: "):
        decode(TASK, HEADERS, None, content)


OTHERS: dict[str, dict[str, Any]] = {
    "celery.node": {"lang": "js", "task": TASK, "id": "one"},
    "rusty-celery": {
        "lang": "rust",
        "task": TASK,
        "id": "one",
        "root_id": "one",
        "retries": 0,
        "timelimit": [None, 30],
        "expires": "2099-11-28T21:03:00.123456789+00:00",
        "origin": "gen1@host",
    },
    "celery-java": {"lang": "java", "task": TASK, "retries": 0, "timelimit": [None, None]},
    "headers as text": {"task": TASK, "retries": "0", "timelimit": ["", "30"], "expires": ""},
    "headers as floats": {"task": TASK, "retries": 0.0, "timelimit": [30.0, 60.0]},
    "lists as tables": {"task": TASK, "timelimit": {"0": None, "1": 30}},
    "no id": {"task": TASK},
}


@pytest.mark.parametrize("headers", OTHERS.values(), ids=OTHERS)
def test_what_clients_of_other_languages_send_is_taken(headers: dict[str, Any]) -> None:
    call = decode(TASK, headers, None, b"[[[1]], {}, {}]", "utf-8")

    assert call.args == [[1]]
    assert call.time_limit == (30 if "30" in str(headers.get("timelimit")) else None)


@pytest.mark.parametrize(("found", "count"), [(3, 3), ("3", 3), (3.0, 3), (Decimal(3), 3), ("", 0)])
def test_retries_are_counted_however_they_are_written(found: object, count: int) -> None:
    assert retries({"retries": found}) == count


@pytest.mark.parametrize(
    "found", [-1, 1001, 1.5, "1.5", "-1", "x", " 1", "1_0", True, math.nan, [1]]
)
def test_retries_that_are_no_count_are_refused(found: object) -> None:
    with pytest.raises(
        MessageRefusedError, match=r"^expected header retries from 0 to 1000, got: "
    ):
        decode(TASK, HEADERS | {"retries": found}, None, body([1]))


MOMENT = datetime(2026, 11, 28, 21, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    "expires",
    [
        MOMENT,
        "2026-11-28T21:03:00+00:00",
        "2026-11-28T21:03:00Z",
        "2026-11-28T22:03+01:00",
        "2026-11-28 21:03:00",
        "20261128T210300Z",
        "2026-11-28T21:03:00.000000000Z",
        1795899780,
        1795899780.0,
        "1795899780",
        1795899780000,
        "1795899780000",
        1795899780000000,
        1795899780000000000,
    ],
)
def test_a_moment_is_read_however_it_is_written(expires: object) -> None:
    call = decode(TASK, HEADERS | {"expires": expires}, None, body([1]))

    assert call.expires == MOMENT


@pytest.mark.parametrize(
    "expires",
    [600, "600", -1, True, 1.5, math.inf, math.nan, 10**11, "soon", [1], b"2026-11-28"],
)
def test_a_moment_that_is_not_sure_is_refused(expires: object) -> None:
    """600 may be ten minutes from a moment that nobody knows."""
    with pytest.raises(MessageRefusedError, match=r"^expected header expires in ISO 8601"):
        decode(TASK, HEADERS | {"expires": expires}, None, body([1]))


@pytest.mark.parametrize("found", [None, "", 0, 0.0, "0", Decimal(0), False, [], {}])
@pytest.mark.parametrize("header", ["expires", "eta", "timelimit", "retries", "compression"])
def test_a_header_that_says_nothing_is_as_good_as_none(header: str, found: object) -> None:
    """PHP's clients write false or 0 for no time to expire, and an empty list for an empty map."""
    call = decode(TASK, HEADERS | {header: found}, None, body([1]))

    assert (call.args, call.expires, call.time_limit) == ([[1]], None, None)


def test_a_body_that_unpacks_to_more_than_is_allowed_is_refused() -> None:
    """Four kilobytes can be made to unpack to four megabytes: what is kept of them is bounded."""
    packed = zlib.compress(body(["x" * BODY_LIMIT]), 9)
    assert len(packed) < BODY_LIMIT / 500

    with pytest.raises(MessageRefusedError) as refusal:
        decode(TASK, HEADERS | {"compression": "application/x-gzip"}, None, packed)

    assert str(refusal.value) == f"expected a whole body of up to {BODY_LIMIT} bytes unpacked"


def test_text_in_another_encoding_is_refused() -> None:
    """It may be UTF-8 by chance, and another text then."""
    content = '[["Ã©"], {}, null]'.encode("latin-1")

    with pytest.raises(MessageRefusedError) as refusal:
        decode(TASK, HEADERS, None, content, "iso-8859-1")

    assert str(refusal.value) == "expected content encoding utf-8, got: 'iso-8859-1'"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_body_in_another_encoding_is_refused_whatever_it_is_said_to_be(encoding: str) -> None:
    """Nobody guesses: what is guessed wrong is another text."""
    content = '[["é"], {}, null]'.encode(encoding)

    with pytest.raises(MessageRefusedError, match=r"^expected a body of JSON in UTF-8, got: "):
        decode(TASK, HEADERS, None, content, "utf-8")


def test_a_mark_before_a_body_in_utf_8_is_no_part_of_it() -> None:
    """So .NET's writers begin."""
    assert decode(TASK, HEADERS, None, b"\xef\xbb\xbf" + body([1])).args == [[1]]


@pytest.mark.parametrize(
    ("limits", "seconds"), [([0, None], None), ([0, 0], None), ([0, 2.5], 2.5), ([9, 4], 4)]
)
def test_a_time_limit_of_0_is_none_as_to_celery(limits: list[Any], seconds: float | None) -> None:
    call = decode(TASK, HEADERS | {"timelimit": limits}, None, body([1]))

    assert call.time_limit == seconds


def test_rows_of_one_id_are_the_ids() -> None:
    """So the original producer sent them."""
    assert check_ids([[3615], [55]]) == check_ids([3615, 55]) == [3615, 55]


def test_an_id_that_comes_twice_counts_once() -> None:
    assert check_ids([7, [7], 5, 7]) == [7, 5]


BAD_IDS = [
    ("'7'", "7"),
    ("0", 0),
    ("-5", -5),
    ("None", None),
    ("1.0", 1.0),
    ("True", True),
    ("4294967296", 2**32),
    ("[[7]]", [[7]]),
    ("[7, 8]", [7, 8]),
    ("[]", []),
]


@pytest.mark.parametrize(("shown", "value"), BAD_IDS)
def test_one_bad_id_refuses_the_whole_message(shown: str, value: object) -> None:
    with pytest.raises(AioworkerError) as refusal:
        read(HEADERS, "application/json", body([3615, value]))

    assert str(refusal.value) == f"expected ids from 1 to 4294967295, got: {shown}"


def test_more_than_a_thousand_ids_are_refused() -> None:
    assert len(check_ids(list(range(1, 1001)))) == 1000
    with pytest.raises(UsageError, match=r"^expected at most 1000 ids, got: 1001$"):
        check_ids([7] * 1001)


REFUSED: list[tuple[str, dict[str, Any], str | None, bytes]] = [
    ("expected header task 'update_current_version', got: None", {}, None, body([1])),
    (
        "expected header task 'update_current_version', got: 'other'",
        {"task": "other"},
        None,
        body([1]),
    ),
    (
        "expected content type application/json, got: 'application/x-python-serialize'",
        HEADERS,
        "application/x-python-serialize",
        body([1]),
    ),
    (
        "expected header retries from 0 to 1000, got: 'x'",
        HEADERS | {"retries": "x"},
        None,
        body([1]),
    ),
    (
        "expected no eta or countdown: aioworker keeps no message for later",
        HEADERS | {"eta": "2030-01-01T00:00:00"},
        None,
        body([1]),
    ),
    (
        "expected a body of JSON in UTF-8, got: Expecting value: line 1 column 1 (char 0)",
        HEADERS,
        None,
        b"",
    ),
    ("expected body [args, kwargs, embed], got: {'a': 1}", HEADERS, None, b'{"a": 1}'),
    (
        "expected arguments (ids): missing a required argument: 'ids'",
        HEADERS,
        None,
        b"[[], {}, null]",
    ),
    (
        "expected arguments (ids): got an unexpected keyword argument 'up'",
        HEADERS,
        None,
        b'[[[1]], {"up": 1}, null]',
    ),
    (
        "expected compression application/x-gzip, got: 'application/x-bz2'",
        HEADERS | {"compression": "application/x-bz2"},
        None,
        body([1]),
    ),
    (
        "expected header expires in ISO 8601, or in seconds since 1970, got: 'soon'",
        HEADERS | {"expires": "soon"},
        None,
        body([1]),
    ),
    (
        "expected header timelimit as [seconds, seconds], got: [-1, None]",
        HEADERS | {"timelimit": [-1, None]},
        None,
        body([1]),
    ),
    (
        "expected no 'chain': aioworker keeps no results to pass on",
        HEADERS,
        None,
        b'[[[1]], {}, {"chain": [{"task": "next"}]}]',
    ),
    (
        "expected nothing in embed but callbacks, errbacks, chain, chord, got: 'canvas'",
        HEADERS,
        None,
        b'[[[1]], {}, {"chain": null, "canvas": 1}]',
    ),
    ("expected a list of ids, got: 'all'", HEADERS, None, b'[["all"], {}, null]'),
]


@pytest.mark.parametrize(("reason", "headers", "content_type", "content"), REFUSED)
def test_what_cannot_be_run_is_refused_with_a_reason(
    reason: str, headers: dict[str, Any], content_type: str | None, content: bytes
) -> None:
    with pytest.raises(AioworkerError) as refusal:
        read(headers, content_type, content)

    assert str(refusal.value) == reason


@given(
    st.binary()
    | st.just(b"[" * 100_000)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_the_body_is_the_reason_is_one_line(content: bytes) -> None:
    """The worker lives, and `dead list` has one line for it."""
    try:
        ids = read(HEADERS, "application/json", content)
    except AioworkerError as refusal:
        reason = str(refusal)
        assert reason.startswith("expected ")
        assert "\n" not in reason
        assert len(reason) < 400
    else:
        assert ids == check_ids(json.loads(content)[0][0])

"""The SQL of the rule, held against an oracle that decides row by row."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymysql.connections import Connection
from pymysql.cursors import Cursor

from aioworker import repo
from aioworker.tasks.chunk import check_ids
from support import servers, site
from tests.conftest import current_versions, execute, make_database

DATES = ("0000-00-00 00:00:00", "2006-08-21 23:53:19", "2010-05-25 00:00:00", "2099-01-01 00:00:00")
VALID = {1, 2, 3, 4, 6, 7}


class Version(NamedTuple):
    """A version of an add-on, with the statuses of its files."""

    created: str
    modified: str
    files: list[int]


class Addon(NamedTuple):
    """An add-on; *current* picks what is stored before."""

    kind: int
    status: int
    inactive: int
    current: int
    versions: list[Version]


version = st.builds(
    Version,
    st.sampled_from(DATES),
    st.sampled_from(DATES),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8]), max_size=3),
)
addon = st.builds(
    Addon,
    st.sampled_from([1, 2, 9]),
    st.sampled_from([0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 11]),
    st.sampled_from([0, 1]),
    st.integers(-1, 5),
    st.lists(version, max_size=6),
)


def answer(addon: Addon, first_version: int) -> int | None:
    """Decide by the rule's words, one version after the other."""
    if addon.kind == 9:
        return None
    best: tuple[str, str, int] | None = None
    for number, (created, modified, files) in enumerate(addon.versions, first_version):
        if addon.status == 6:
            fits = True
        elif addon.status == 4:
            fits = bool(files) and all(status == 4 for status in files)
        else:
            fits = bool(files) and all(status in VALID for status in files)
        # A zero date sorts oldest as text too.
        if fits and (best is None or (created, modified, number) > best):
            best = (created, modified, number)
    return best[2] if best else None


@pytest.fixture(scope="module")
def oracle_site(pair: servers.Servers) -> Iterator[Connection[Cursor]]:
    """The tables, kept over all examples."""
    connection = servers.connect(pair.mysql_url, create=True)
    site.create(connection)
    yield connection
    connection.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(addon, min_size=1, max_size=8),
    st.lists(st.integers(1, 12), max_size=20),
)
def test_every_site_is_refreshed_as_the_rule_says(
    pair: servers.Servers,
    oracle_site: Connection[Cursor],
    addons: list[Addon],
    ids: list[int],
) -> None:
    """Ties, zero dates, several files, wrong old values, unknown and doubled ids."""
    execute(
        oracle_site,
        "SET foreign_key_checks = 0",
        "DELETE FROM files",
        "DELETE FROM versions",
        "DELETE FROM addons",
        "SET foreign_key_checks = 1",
    )
    expected = {}
    for number, one in enumerate(addons, 1):
        first = number * 10
        versions = [(first + n, *v) for n, v in enumerate(one.versions)]
        before = first + one.current if 0 <= one.current < len(versions) else None
        site.insert_addon(
            oracle_site, (number, one.kind, one.status, one.inactive, before), versions
        )
        expected[number] = answer(one, first) if number in ids else before

    result, again = asyncio.run(refresh_twice(pair, ids))

    assert current_versions(oracle_site) == expected
    assert result.missing == sorted({n for n in ids if n > len(addons)})
    assert (result.refused, again.changed) == ({}, [])


async def refresh_twice(pair: servers.Servers, ids: list[int]) -> tuple[repo.Refresh, repo.Refresh]:
    """Refresh a chunk, then the same once more."""
    database = make_database(pair)
    try:
        chunk = check_ids(ids)
        return await repo.refresh(database, chunk), await repo.refresh(database, chunk)
    finally:
        database.close()

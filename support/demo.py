"""The main job, shown: a site of 2010's size with stale rows, swept at a steady rate."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from aioworker.limits import RateLimit
from aioworker.words import count
from support import servers, site, versions

ADDONS = 12_000
RATE = "60/m"
AIOWORKER = Path(sys.executable).parent / "aioworker"
# Of one message, of several that ran together, and of several that needed no run.
DONE = ("chunk done", "start done", "nothing to write")


def main() -> int:
    """Run the demo; return 0 when no row is stale at its end."""
    began = time.monotonic()
    versions.main()
    print("Starting those that are private, on loopback …", flush=True)
    with servers.servers() as pair:
        connection = servers.connect(pair.mysql_url, create=True)
        print(f"Filling a site: {ADDONS:,} add-ons to sweep, beside personas …", flush=True)
        site.create(connection)
        site.fill(connection, ADDONS)
        site.answer_all(connection)
        site.spoil_some(connection)
        with connection.cursor() as cursor:
            for table in ("addons", "versions", "files"):
                cursor.execute(f"SELECT COUNT(*) FROM {table}")
                print(f"  {table:<9}{cursor.fetchall()[0][0]:>9,} rows")
        stale = site.count_stale(connection)
        environment = pair.environment | {"AIOWORKER_LOG_FORMAT": "json"}
        _run(environment, "init")
        _run(environment, "publish-all")
        swept = time.monotonic()
        events = _run(environment, "consume", "--burst", "--rate-limit", RATE)
        took = time.monotonic() - swept
        left = site.count_stale(connection)
        connection.close()
    _show(events, stale, left, took)
    print(f"\nAll of it took {time.monotonic() - began:.0f} s.")
    return 1 if left else 0


def _run(environment: dict[str, str], *arguments: str) -> list[dict[str, Any]]:
    """Run a command, showing what is done as it is; return its log's events."""
    print(f"\n$ aioworker {' '.join(arguments)}", flush=True)
    events = []
    with subprocess.Popen(
        [AIOWORKER, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            if not line.startswith("{"):
                print(line, end="", flush=True)
                continue
            events.append(event := {"messages": 1, "changed": 0} | json.loads(line))
            if event["event"] in DONE:
                print(
                    "{event}: {messages} of {ids} ids, {changed} changed,"
                    " waited {wait_seconds:.1f} s, ran {run_seconds:.2f} s".format(
                        **event | {"messages": count(event["messages"], "chunk")}
                    ),
                    flush=True,
                )
    if process.returncode:
        sys.exit(f"aioworker {arguments[0]}: exit status {process.returncode}")
    return events


def _show(events: list[dict[str, Any]], stale: int, left: int, took: float) -> None:
    """Print what a person wants to see of a sweep."""
    done = [event for event in events if event["event"] in DONE]
    changed = sum(event["changed"] for event in done)
    starts = [
        datetime.fromisoformat(event["time"]).timestamp() - event["run_seconds"]
        for event in done
        if event["changed"]
    ]
    gaps = [after - before for before, after in pairwise(starts)]
    interval = RateLimit.parse(RATE).interval
    print("\n" + "-" * 64)
    print(f"stale rows before          {stale:>8,}")
    print(f"stale rows after           {left:>8,}   (counted by a query of its own)")
    print(f"rows changed               {changed:>8,}")
    print(f"rows right, left alone     {sum(event['ids'] for event in done) - changed:>8,}")
    print(f"chunks                     {sum(event['messages'] for event in done):>8,}")
    print(f"starts                     {len(starts):>8,}   in {took:.1f} s")
    print(f"rate limit                 {RATE:>8}   a start every {interval:g} s")
    if gaps:
        print(f"least gap between starts   {min(gaps):>7.2f}s")


if __name__ == "__main__":
    servers.quietly(main)

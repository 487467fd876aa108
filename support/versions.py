"""Name and version of each server of a run: `python -m support.versions` prints them.

Servers that the environment names are asked; of those that would be started, their programs.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from pymysql.err import MySQLError

from aioworker.addresses import BrokerAddress, DatabaseAddress, Nodes
from aioworker.rabbitmq.connection import connected
from support import servers

SECONDS = 10


def rabbitmq() -> str:
    """Return RabbitMQ's name and version, and where it is."""
    url = servers.named("AMQP")
    if not url:
        control = servers.rabbitmq_scripts() / "rabbitmqctl"
        return f"RabbitMQ {_printed(control, 'version')}, private"
    address = BrokerAddress.parse_all(url)[0]
    try:
        told = asyncio.run(_properties(address))
    except OSError as error:
        sys.exit(f"AIOWORKER_AMQP_URL: no RabbitMQ answers at {address.shown}: {error}")
    return f"{told['product']} {told['version']}, at {address.shown}"


async def _properties(address: BrokerAddress) -> dict[str, object]:
    async with connected(Nodes([address]), SECONDS, "versions") as connection:
        assert connection.transport is not None
        return dict(connection.transport.connection.server_properties)


def database() -> str:
    """Return the database server's name and version, and where it is."""
    url = servers.named("MYSQL")
    if not url:
        return f"MariaDB {_printed(servers.program('mariadbd'), '--version')}, private"
    address = DatabaseAddress.parse(url)
    try:
        with servers.login(address) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT VERSION()")
            [[version]] = cursor.fetchall()
    except MySQLError as error:
        sys.exit(f"AIOWORKER_MYSQL_URL: no server answers at {address.shown}: {error}")
    kind = "MariaDB" if "MariaDB" in version else "MySQL"
    return f"{kind} {version.partition('-')[0]}, at {address.shown}"


def _printed(*command: str | Path) -> str:
    """Return the version that a program prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    found = re.search(r"\d+\.\d+\.\d+", done.stdout)
    return found[0] if found else "of an unknown version"


def main() -> None:
    """Print them."""
    print(rabbitmq())
    print(database(), flush=True)


if __name__ == "__main__":
    main()

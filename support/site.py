"""An add-on site's tables, filled as a real one is: skewed, with old mistakes in it.

Everything is made by the server from row numbers, so that the same sizes give the
same site. Needs a PyMySQL connection whose user may create tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

TABLES = (
    """CREATE TABLE addons (
        id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
        addontype_id INT UNSIGNED NOT NULL,
        status TINYINT UNSIGNED NOT NULL,
        inactive TINYINT(1) UNSIGNED NOT NULL DEFAULT 0,
        created DATETIME NOT NULL,
        modified DATETIME NOT NULL,
        current_version INT UNSIGNED NULL,
        average_daily_users INT UNSIGNED NOT NULL DEFAULT 0
    ) ENGINE=InnoDB""",
    """CREATE TABLE versions (
        id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
        addon_id INT UNSIGNED NOT NULL,
        version VARCHAR(255) NOT NULL,
        created DATETIME NOT NULL,
        modified DATETIME NOT NULL,
        KEY addon_id (addon_id),
        CONSTRAINT versions_addon FOREIGN KEY (addon_id) REFERENCES addons (id)
    ) ENGINE=InnoDB""",
    """CREATE TABLE files (
        id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
        version_id INT UNSIGNED NOT NULL,
        status TINYINT UNSIGNED NOT NULL,
        KEY version_id (version_id),
        KEY status (status),
        CONSTRAINT files_version FOREIGN KEY (version_id) REFERENCES versions (id)
    ) ENGINE=InnoDB""",
    """ALTER TABLE addons ADD KEY current_version (current_version),
        ADD CONSTRAINT addons_version FOREIGN KEY (current_version)
        REFERENCES versions (id) ON DELETE SET NULL""",
)

# The rule of the main job, row by row and on its own: nothing of it is taken from
# aioworker, so that the two can be held against each other.
ANSWER = """(SELECT v.id FROM versions v WHERE v.addon_id = a.id AND a.addontype_id <> 9
    AND (a.status = 6 OR (EXISTS (SELECT 1 FROM files f WHERE f.version_id = v.id)
        AND NOT EXISTS (SELECT 1 FROM files f WHERE f.version_id = v.id
            AND (CASE WHEN a.status = 4 THEN f.status <> 4
                ELSE f.status NOT IN (1, 2, 3, 4, 6, 7) END))))
    ORDER BY v.created DESC, v.modified DESC, v.id DESC LIMIT 1)"""
SWEPT = "a.inactive = 0 AND a.addontype_id <> 9 AND a.status IN (1, 2, 3, 4, 6, 7)"

_ONE_IN = 53  # ids that repeat one pattern: 3 add-ons to sweep, 1 retired, the rest personas


def create(connection: Connection[Cursor]) -> None:
    """Create the empty tables of the site in the connection's database."""
    with connection.cursor() as cursor:
        for statement in TABLES:
            cursor.execute(statement)


def fill(connection: Connection[Cursor], addons: int, *, personas: bool = True) -> None:
    """Fill the tables with *addons* add-ons to sweep, eight versions each on average.

    A third as many retired add-ons and, with *personas*, sixteen times as many personas
    lie between them. About one add-on in five hundred has 300 versions; every 997th
    version has zero dates; one version in twenty has no file, one in ten has two.
    `current_version` is NULL everywhere; see `answer_all`.
    """
    kinds = _ONE_IN if personas else 4
    rows = addons * kinds // 3
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_mode = '', unique_checks = 0, foreign_key_checks = 0")
        number_rows(cursor, max(rows, 300))
        cursor.execute(
            f"""INSERT INTO addons (id, addontype_id, status, inactive, created, modified)
            SELECT n + 1, IF(n % {kinds} > 3, 9, 1 + CRC32(n) % 5),
                CASE WHEN n % {kinds} = 3 THEN 5 * (CRC32(n) % 2)
                    ELSE ELT(1 + CRC32(CONCAT('s', n)) % 20, 1, 1, 1, 2, 3, 6, 7,
                        4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4) END,
                n % {kinds} = 3, '2009-01-01', '2010-05-25' FROM numbers WHERE n < {rows}"""
        )
        cursor.execute(
            """INSERT INTO versions (addon_id, version, created, modified)
            SELECT id, CONCAT('1.', n),
                IF(CRC32(CONCAT(id, '.', n)) % 997 = 0, 0, TIMESTAMPADD(HOUR,
                    n * 300 + CRC32(CONCAT(id, '-', n)) % 600, '2004-06-01')),
                IF(CRC32(CONCAT(id, '.', n)) % 997 = 0, 0, TIMESTAMPADD(HOUR,
                    CRC32(CONCAT(n, '-', id)) % 60000, '2004-06-01'))
            FROM (SELECT id, CASE WHEN inactive THEN 1 WHEN CRC32(id) % 500 = 0 THEN 300
                ELSE 1 + FLOOR(-LN((CRC32(CONCAT('v', id)) % 10000 + 1) / 10001) * 6.9)
                END AS versions
                FROM addons WHERE addontype_id <> 9) AS a
            JOIN numbers ON n < versions AND n < 300 ORDER BY id, n"""
        )
        cursor.execute(
            """INSERT INTO files (version_id, status)
            SELECT v.id, ELT(1 + CRC32(CONCAT('f', v.id, '.', n)) % 16,
                1, 1, 2, 5, 7, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)
            FROM versions v JOIN numbers
                ON n < CASE WHEN CRC32(v.id) % 20 = 0 THEN 0 WHEN CRC32(v.id) % 10 = 1 THEN 2
                    ELSE 1 END AND n < 2 ORDER BY v.id, n"""
        )
        cursor.execute("DROP TABLE numbers")
        cursor.execute("SET SESSION sql_mode = DEFAULT, unique_checks = 1, foreign_key_checks = 1")
        cursor.execute("ANALYZE TABLE addons, versions, files")
    connection.commit()


def fill_plainly(connection: Connection[Cursor], addons: int) -> None:
    """Fill `addons` alone, every id from 1 on to be swept, with an index on `inactive`."""
    with connection.cursor() as cursor:
        number_rows(cursor, addons + 1)
        cursor.execute(
            """INSERT INTO addons (id, addontype_id, status, created, modified)
            SELECT n, 1, 4, '2009-01-01', '2010-05-25' FROM numbers WHERE n > 0"""
        )
        cursor.execute("DROP TABLE numbers")
        cursor.execute("ALTER TABLE addons ADD KEY inactive (inactive)")
        cursor.execute("ANALYZE TABLE addons")
    connection.commit()


def number_rows(cursor: Cursor, count: int) -> None:
    """Create table `numbers` with n from 0 to *count* - 1."""
    cursor.execute("CREATE TABLE numbers (n INT UNSIGNED PRIMARY KEY) ENGINE=InnoDB")
    cursor.execute("INSERT INTO numbers VALUES (0)")
    made = 1
    while made < count:
        more = min(made, count - made)
        cursor.execute(f"INSERT INTO numbers SELECT n + {made} FROM numbers WHERE n < {more}")
        made += more


def answer_all(connection: Connection[Cursor]) -> None:
    """Give every add-on its right `current_version`."""
    _update_swept(connection, "a.current_version = answers.answer", "TRUE")


def spoil_all(connection: Connection[Cursor]) -> None:
    """Make every add-on that is swept and has a version stale."""
    some_version = "(SELECT MIN(v.id) FROM versions v WHERE v.addon_id = a.id)"
    _update_swept(
        connection, f"a.current_version = IF(answers.answer IS NULL, {some_version}, NULL)", "TRUE"
    )


def spoil_some(connection: Connection[Cursor]) -> None:
    """Make about four swept add-ons in ten stale: two never filled, two out of date."""
    some_version = "(SELECT MIN(v.id) FROM versions v WHERE v.addon_id = a.id)"
    _update_swept(
        connection,
        f"a.current_version = IF(CRC32(a.id) % 10 < 2, NULL, {some_version})",
        "CRC32(a.id) % 10 < 4",
    )


def _update_swept(connection: Connection[Cursor], assignment: str, condition: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"""UPDATE addons a JOIN (SELECT a.id, {ANSWER} AS answer FROM addons a
                WHERE {SWEPT} AND {condition}) AS answers ON answers.id = a.id SET {assignment}"""
        )
    connection.commit()


def count_stale(connection: Connection[Cursor]) -> int:
    """Count the swept add-ons whose `current_version` is not the right one."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT COUNT(*) FROM addons a WHERE {SWEPT} AND NOT (current_version <=> {ANSWER})"
        )
        row = cursor.fetchone()
    connection.commit()  # the next count reads what others wrote meanwhile
    assert row is not None  # COUNT always answers with one row
    return int(row[0])


def insert_addon(
    connection: Connection[Cursor],
    addon: Sequence[int | None],
    versions: Sequence[tuple[int, str, str, Sequence[int]]],
) -> None:
    """Insert one add-on with its versions.

    Args:
        connection: The site's database.
        addon: id, type, status, inactive, current_version.
        versions: id, created, modified and the statuses of the files, for each.
    """
    identity, kind, status, inactive, current = addon
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_mode = ''")
        cursor.execute(
            "INSERT INTO addons (id, addontype_id, status, inactive, created, modified)"
            " VALUES (%s, %s, %s, %s, '2009-01-01', '2010-05-25')",
            (identity, kind, status, inactive),
        )
        for version, created, modified, files in versions:
            cursor.execute(
                "INSERT INTO versions VALUES (%s, %s, '1.0', %s, %s)",
                (version, identity, created, modified),
            )
            for file_status in files:
                cursor.execute(
                    "INSERT INTO files (version_id, status) VALUES (%s, %s)", (version, file_status)
                )
        if current is not None:
            # A current_version may name a version of nobody here: only its row has to exist.
            cursor.execute("SET SESSION foreign_key_checks = 0")
            cursor.execute(
                "UPDATE addons SET current_version = %s WHERE id = %s", (current, identity)
            )
            cursor.execute("SET SESSION foreign_key_checks = 1")
        cursor.execute("SET SESSION sql_mode = DEFAULT")
    connection.commit()

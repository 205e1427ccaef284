"""Label stores of older versions of rlhf, brought to the present schema in place. A copy is kept first."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from rlhf.database import shown, sqlite_path
from rlhf.event_log import MIGRATED, add_event, append
from rlhf.judgements import log_ranking, log_withdrawal
from rlhf.progress import say
from rlhf.schema import SCHEMA_VERSION, assignments, items, meta, rankings, tables
from rlhf.types import DataError

ADVISORY_LOCK = 7_239_001
"""Two processes that open a new PostgreSQL store at once would both make its tables."""

version_1 = sa.MetaData()
"""What version 1 had other than version 2; the other tables are the same."""

old_events = sa.Table(
    "events",
    version_1,
    sa.Column("id", sa.Integer, primary_key=True),
    *(sa.Column(name, sa.Text) for name in ("at", "kind", "annotator")),
    sa.Column("item_id", sa.Integer),
    sa.Column("payload", sa.JSON),
)
old_assignments = sa.Table(
    "assignments",
    version_1,
    *(sa.Column(name, sa.Integer) for name in ("id", "item_id", "event")),
    *(sa.Column(name, sa.Text) for name in ("annotator", "state")),
    sa.Column("presented_order", sa.JSON),
    sa.Column("leased_until", sa.Float),
)
old_rankings = sa.Table(
    "rankings",
    version_1,
    *(sa.Column(name, sa.Integer) for name in ("id", "assignment_id", "version", "guideline_version")),
    *(sa.Column(name, sa.Text) for name in ("idempotency_key", "rationale", "created_at")),
    sa.Column("active", sa.Boolean),
    *(sa.Column(name, sa.JSON(none_as_null=True)) for name in ("ranks", "presented_order", "flags")),
    sa.Column("seconds", sa.Float),
)


def prepare(connection: sa.Connection, name: str, *, backed_up: bool = False) -> None:
    """Make the tables of a new store, or bring an old one to the present schema, inside a write transaction.

    A copy of an SQLite file is kept beside it; a PostgreSQL database is changed only with `backed_up`, the user's word
    that a copy is kept. Raises DataError otherwise, and where a newer version of rlhf has written the store.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
    known = version(connection)
    if known is None:
        tables.create_all(connection)
        connection.execute(sa.insert(meta).values(name="schema_version", value=str(SCHEMA_VERSION)))
    elif known == 1:
        kept = _keep_copy(name, backed_up=backed_up)
        _from_1_to_2(connection)
        say(f"{shown(name)}: brought from schema 1 to schema {SCHEMA_VERSION}{kept}")
    elif known != SCHEMA_VERSION:
        raise DataError(
            f"the label store {shown(name)} has schema {known}, this version of rlhf knows {SCHEMA_VERSION}: "
            f"use the version of rlhf that wrote it, or a newer one"
        )


def version(connection: sa.Connection) -> int | None:
    """The schema of a store; None for an empty database."""
    if not sa.inspect(connection).has_table(meta.name):
        return None
    value = connection.scalars(sa.select(meta.c.value).where(meta.c.name == "schema_version")).one_or_none()
    return None if value is None else int(value)


def _keep_copy(name: str, *, backed_up: bool) -> str:
    """Where the copy is, in words."""
    path = sqlite_path(name)
    if path is not None:
        return f"; the old store is kept as {copy_aside(path, 'v1-backup')}"
    if not backed_up:
        raise DataError(
            f"the label store {shown(name)} was written by an older version of rlhf and is brought to the present "
            f"schema in place: keep a copy with pg_dump, then run `rlhf data migrate --i-have-a-backup` on it"
        )
    return ""


def copy_aside(path: Path, label: str) -> Path:
    """Copy an SQLite file, as last committed, to a new file beside it, `labels.<label>.db`; returns the copy's path."""
    copy = beside(path, label)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def beside(path: Path, label: str) -> Path:
    """A path beside this one that is still free: `labels.<label>.db`, `labels.<label>-2.db` ..."""
    numbers = ("", *(f"-{number}" for number in range(2, 1000)))
    return next(
        free for n in numbers if not (free := path.with_name(f"{path.stem}.{label}{n}{path.suffix or '.db'}")).exists()
    )


def _from_1_to_2(connection: sa.Connection) -> None:
    """The old events come first in the new log, then every ranking in an event of its own, as found."""
    events = _rows(connection, old_events)
    held = _rows(connection, old_assignments)
    said = _rows(connection, old_rankings)
    for table in (old_rankings, old_assignments, old_events):  # what refers to others first
        table.drop(connection)
    tables.create_all(connection)
    numbers = {each["id"]: _log_again(connection, each) for each in events}
    for each in held:
        row = {**each, "kind": "task", "event": numbers.get(each["event"], 0)}
        connection.execute(sa.insert(assignments).values(row))
    for each in sorted(said, key=lambda row: (row["assignment_id"], row["version"])):
        row = {**each, "marks": []}
        connection.execute(sa.insert(rankings).values({**row, "event": log_ranking(connection, row)}))
    stand = {each["assignment_id"] for each in said if each["active"]}
    for assignment_id in sorted({each["assignment_id"] for each in said} - stand):
        log_withdrawal(connection, assignment_id)
    keys = {str(row.id): row.key for row in connection.execute(sa.select(items.c.id, items.c.key))}
    add_event(connection, MIGRATED, before=1, after=SCHEMA_VERSION, keys=keys)
    renumber(connection)
    connection.execute(sa.update(meta).where(meta.c.name == "schema_version").values(value=str(SCHEMA_VERSION)))


def _rows(connection: sa.Connection, table: sa.Table) -> Sequence[dict[str, Any]]:
    return [dict(row) for row in connection.execute(sa.select(table).order_by(table.c.id)).mappings()]


def _log_again(connection: sa.Connection, event: dict[str, Any]) -> int:
    kind, annotator, item_id, payload = (event[name] for name in ("kind", "annotator", "item_id", "payload"))
    return append(connection, kind, annotator, item_id, payload, event["at"])


def renumber(connection: sa.Connection) -> None:
    """After rows were stored with ids of their own: let PostgreSQL's counters go on behind them."""
    if connection.dialect.name != "postgresql":
        return
    for table in tables.sorted_tables:
        column = table.autoincrement_column
        if column is not None:
            counter = sa.func.pg_get_serial_sequence(table.name, column.name)
            last = sa.select(sa.func.coalesce(sa.func.max(column), 0) + 1).scalar_subquery()
            connection.execute(sa.select(sa.func.setval(counter, last, False)))

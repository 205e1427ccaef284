"""Erasing a person from a label store: name and texts are gone from every table, the rankings stay, the log holds.

What the person's events said is removed with its salts, so that nobody can try out what it was; their hashes stay in
the chain. The rankings that stay are said once more, under a pseudonym and without texts, by new events, and so can
still be checked against the log.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from rlhf.database import BUSY_SECONDS, shown, sqlite_path
from rlhf.event_log import ERASED, RANKING, add_event
from rlhf.judgements import log_ranking, log_withdrawal
from rlhf.schema import assignments, drafts, events, invites, payloads, quiz_results, rankings, sessions, tables, users
from rlhf.store import Store
from rlhf.types import DataError

OURS = ("role", "assignment_kind", "reopened", "undone")
"""Fields of events that hold words of this program: whoever is called `admin` or `late` is not meant."""


def erase(store: Store, annotator: str) -> str:
    """Erase a person and return the pseudonym under which their rankings stay. Raises DataError for an unknown name.

    Copies that were made before (backups, exports, the copy of a migration) still hold the name: they are the caller's.
    Raises DataError, too, where the file cannot be cleaned because another process reads on; `clean` it then later.
    """
    pseudonym = f"erased-{secrets.token_hex(4)}"
    with store.write() as connection:
        if not _is_known(connection, annotator):
            raise DataError(
                f"{shown(store.name)} knows nobody named {annotator!r}; `rlhf data events` shows who is there"
            )
        forgotten = _events_of(connection, annotator)
        _forget_account(connection, annotator, pseudonym)
        _rename(connection, annotator, pseudonym)
        for event in forgotten:
            mine = payloads.c.event_id == event
            name = sa.case((payloads.c.annotator == annotator, pseudonym), else_=payloads.c.annotator)
            connection.execute(sa.update(payloads).where(mine).values(body=None, salt="", annotator=name))
        # what is left under the name has no body any more: somebody else's erasure took it
        connection.execute(sa.update(payloads).where(payloads.c.annotator == annotator).values(annotator=pseudonym))
        add_event(connection, ERASED, pseudonym=pseudonym, events=forgotten)
        _say_again(connection, pseudonym)
    try:
        clean(store)
    except DataError as error:
        raise DataError(f"{annotator!r} is now {pseudonym}; {error}") from error
    return pseudonym


def clean(store: Store) -> None:
    """Rewrite the store's files without what was deleted. Raises DataError while others hold them."""
    path = sqlite_path(store.name)
    if path is None:
        everything = ", ".join(f'"{table.name}"' for table in tables.sorted_tables)
        try:
            with store.engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(f"VACUUM FULL {everything}")
        except exc.DBAPIError as error:
            raise DataError(_unclean(store, " ".join(str(error.orig).split()))) from error
        return
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA secure_delete=ON")
            connection.execute("VACUUM")
            held, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        raise DataError(_unclean(store, str(error))) from error
    if held:
        raise DataError(_unclean(store, "another process reads it"))


def _unclean(store: Store, reason: str) -> str:
    return (
        f"what was erased is gone from the tables of {shown(store.name)}, but traces may be left in its files "
        f"({reason}): end `rlhf label` and run `rlhf data clean`"
    )


def _is_known(connection: sa.Connection, name: str) -> bool:
    places = (assignments.c.annotator, payloads.c.annotator, users.c.name, invites.c.name, quiz_results.c.annotator)
    found = (connection.execute(sa.select(sa.literal(1)).where(place == name).limit(1)).first() for place in places)
    return any(found)


def _events_of(connection: sa.Connection, name: str) -> list[int]:
    """The events that the person caused, and those of others, such as an admin's, that name them."""
    query = sa.select(payloads.c.event_id, payloads.c.annotator, payloads.c.body, events.c.kind).join(events)
    quoted = json.dumps(name)[1:-1]
    rows = connection.execute(query.where(payloads.c.body.is_not(None)).order_by(payloads.c.event_id))
    return [
        row.event_id
        for row in rows
        if row.annotator == name
        or (row.kind != RANKING and quoted in row.body and name in _strings(json.loads(row.body)))
    ]


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, but for those that only this program writes."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from () if key in OURS else _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _holds_text(value: Any) -> bool:
    """Whether there is a text anywhere in a JSON value."""
    if isinstance(value, dict):
        return any(map(_holds_text, value.values()))
    return any(map(_holds_text, value)) if isinstance(value, list) else isinstance(value, str)


def _forget_account(connection: sa.Connection, name: str, pseudonym: str) -> None:
    theirs = sa.select(users.c.id).where(users.c.name == name)
    connection.execute(sa.delete(sessions).where(sessions.c.user_id.in_(theirs)))
    connection.execute(sa.delete(users).where(users.c.name == name))
    connection.execute(sa.delete(invites).where(sa.or_(invites.c.name == name, invites.c.used_by == name)))
    connection.execute(sa.update(invites).where(invites.c.created_by == name).values(created_by=pseudonym))


def _rename(connection: sa.Connection, name: str, pseudonym: str) -> None:
    """Put the pseudonym in the name's place, and remove what the person wrote."""
    theirs = sa.select(assignments.c.id).where(assignments.c.annotator == name)
    connection.execute(sa.delete(drafts).where(drafts.c.assignment_id.in_(theirs)))
    for row in connection.execute(sa.select(rankings).where(rankings.c.assignment_id.in_(theirs))).all():
        values = {
            "rationale": None,
            "flags": {flag: value for flag, value in row.flags.items() if not _holds_text(value)},
            "idempotency_key": f"erased:{secrets.token_hex(16)}",  # an imported one can be worked out from the name
        }
        connection.execute(sa.update(rankings).where(rankings.c.id == row.id).values(values))
    connection.execute(sa.update(assignments).where(assignments.c.annotator == name).values(annotator=pseudonym))
    answered = sa.update(quiz_results).where(quiz_results.c.annotator == name)
    connection.execute(answered.values(annotator=pseudonym, answers=[]))


def _say_again(connection: sa.Connection, pseudonym: str) -> None:
    """An event of its own for each ranking that stays, in the order of versions, so that the log says what stands."""
    query = (
        sa.select(rankings)
        .join(assignments, rankings.c.assignment_id == assignments.c.id)
        .where(assignments.c.annotator == pseudonym)
        .order_by(rankings.c.assignment_id, rankings.c.version)
    )
    stands: dict[int, bool] = {}
    for row in connection.execute(query).mappings().all():
        event = log_ranking(connection, row)
        connection.execute(sa.update(rankings).where(rankings.c.id == row["id"]).values(event=event))
        stands[row["assignment_id"]] = row["active"]
    for assignment_id in [each for each, active in stands.items() if not active]:
        log_withdrawal(connection, assignment_id)

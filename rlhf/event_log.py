"""The store's append-only log: each event holds the hash of the one before, so that no change to the past is silent.

What an event says stands apart, in its payload, and the chain holds only the payload's salted hash. Thus a person's
words can be erased while the chain still verifies.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from rlhf.schema import events, meta, payloads, rankings

GENESIS = "0" * 64
"""What the first event holds as the hash of the one before."""

HEAD = "log_head"
"""The row of `meta` with the number and hash of the last event; a log that was cut short does not fit it."""

ITEM, RANKING, WITHDRAWN, FORGET, ERASED, MIGRATED = "item", "ranking", "withdrawn", "forget", "erased", "migrated"
"""The kinds of event from which the items, the rankings that stand, and what may be missing can be worked out."""

SAID = tuple(column.name for column in rankings.columns if column.name not in ("id", "active", "event"))
"""The columns of a ranking, all of which its event repeats."""


def add_event(
    connection: sa.Connection, kind: str, annotator: str | None = None, item_id: int | None = None, **payload: Any
) -> int:
    """Append to the log and return the event's number; events are never changed or removed.

    Only inside `Store.write()`, which lets one writer in at a time. The payload must be made of JSON values.
    """
    return append(connection, kind, annotator, item_id, payload)


def append(
    connection: sa.Connection,
    kind: str,
    annotator: str | None,
    item_id: int | None,
    payload: Mapping[str, Any],
    at: str | None = None,
) -> int:
    """`add_event` for a payload of any names, and for what happened at another time."""
    body, salt = canonical(payload), secrets.token_hex(16)
    number, previous = head(connection)
    row = {
        "id": number + 1,
        "at": at or now(),
        "kind": kind,
        "item_id": item_id,
        "payload_hash": payload_hash(salt, annotator, body),
        "previous": previous,
    }
    row["hash"] = event_hash(**row)
    connection.execute(sa.insert(events).values(row))
    connection.execute(sa.insert(payloads).values(event_id=row["id"], annotator=annotator, salt=salt, body=body))
    _set_head(connection, row["id"], row["hash"])
    return row["id"]


def head(connection: sa.Connection) -> tuple[int, str]:
    """Number and hash of the last event."""
    value = connection.scalars(sa.select(meta.c.value).where(meta.c.name == HEAD)).one_or_none()
    if value is None:
        return 0, GENESIS
    number, _, last = value.partition(":")
    return int(number), last


def _set_head(connection: sa.Connection, number: int, last: str) -> None:
    value = f"{number}:{last}"
    if connection.execute(sa.update(meta).where(meta.c.name == HEAD).values(value=value)).rowcount == 0:
        connection.execute(sa.insert(meta).values(name=HEAD, value=value))


def canonical(value: Any) -> str:
    """The one way in which a JSON value is written here: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def payload_hash(salt: str, annotator: str | None, body: str) -> str:
    """SHA-256 of the salt and what an event says, and who said it."""
    said = f'{{"annotator":{canonical(annotator)},"payload":{body}}}'
    return _sha256(salt + said)


def event_hash(*, id: int, at: str, kind: str, item_id: int | None, payload_hash: str, previous: str) -> str:
    """SHA-256 of an event's columns, the hash of the one before among them."""
    parts = (previous, id, at, kind, "" if item_id is None else item_id, payload_hash)
    return _sha256("|".join(map(str, parts)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def now() -> str:
    """The present moment, as stored: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

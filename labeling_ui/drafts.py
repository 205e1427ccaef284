"""What an annotator has begun to say, kept on the server until it is submitted."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from rlhf.schema import drafts
from rlhf.types import DataError

MAX_BYTES = 16_384


def keep(connection: sa.Connection, assignment_id: int, body: dict[str, Any], at: str) -> None:
    """Store a draft in the place of the one before. Raises DataError where it is no JSON object or too large."""
    if not isinstance(body, dict):
        raise DataError("a draft must be a JSON object")
    try:
        size = len(json.dumps(body, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"this draft cannot be kept: {error}") from error
    if size > MAX_BYTES:
        raise DataError(f"this draft has {size} bytes; {MAX_BYTES} are kept: shorten the rationale or the note")
    row = {"body": body, "saved_at": at}
    changed = connection.execute(sa.update(drafts).where(drafts.c.assignment_id == assignment_id).values(row))
    if changed.rowcount == 0:
        connection.execute(sa.insert(drafts).values(assignment_id=assignment_id, **row))


def find(connection: sa.Connection, assignment_id: int) -> dict[str, Any] | None:
    """The draft of an assignment."""
    return connection.scalar(sa.select(drafts.c.body).where(drafts.c.assignment_id == assignment_id))


def drop(connection: sa.Connection, assignment_id: int) -> None:
    """Forget a draft: what it said has been submitted."""
    connection.execute(sa.delete(drafts).where(drafts.c.assignment_id == assignment_id))

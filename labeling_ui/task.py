"""An item as one annotator sees it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui import drafts, history
from labeling_ui.assignment import Assignment
from labeling_ui.said import Said, as_said
from rlhf.schema import completions, items, rankings
from rlhf.types import Prompt


@dataclass(frozen=True)
class Task:
    """What an annotator sees: texts without their origin, in the annotator's own order.

    Nothing in it tells a gold item or a repeat from an ordinary one.
    """

    id: int
    prompt: Prompt
    completions: tuple[str, ...]
    key: str
    """The idempotency key under which this showing of the task is to be submitted."""
    before: Said | None = None
    """What the annotator has said of it: before an undo, or what stands until an edit is submitted."""
    said_at: float | None = None
    """Unix time of what stands; None where nothing does."""
    draft: dict[str, Any] | None = None
    """What the annotator had begun to say, as the page left it."""


def show(connection: sa.Connection, given: Assignment) -> Task:
    """The task of an assignment, under a new key."""
    prompt, texts = read(connection, given)
    return Task(
        id=given.id,
        prompt=prompt,
        completions=texts,
        key=uuid.uuid4().hex,
        before=_said_before(connection, given),
        said_at=history.saved_at(connection, given.id),
        draft=drafts.find(connection, given.id),
    )


def read(connection: sa.Connection, given: Assignment) -> tuple[Prompt, tuple[str, ...]]:
    """Prompt and completions, in the order shown."""
    prompt = connection.scalars(sa.select(items.c.prompt).where(items.c.id == given.item_id)).one()
    mine = completions.c.item_id == given.item_id
    texts = connection.scalars(sa.select(completions.c.text).where(mine).order_by(completions.c.position)).all()
    return prompt, tuple(texts[index] for index in given.presented_order)


def _said_before(connection: sa.Connection, given: Assignment) -> Said | None:
    mine = rankings.c.assignment_id == given.id
    last = connection.execute(
        sa.select(rankings).where(mine).order_by(rankings.c.version.desc()).limit(1)
    ).one_or_none()
    return None if last is None else as_said(last.ranks, last.flags, last.rationale, given.presented_order)

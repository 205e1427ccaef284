"""What an annotator has said so far: receipts, what can still be changed, how far they are and how fast."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa

from labeling_ui import assignment, hidden, pace, places
from labeling_ui.assignment import Assignment
from labeling_ui.places import DONE, SKIPPED, Policy
from labeling_ui.refusals import Conflict
from rlhf.judgements import LATE, Judgement
from rlhf.schema import assignments, events, items, rankings
from rlhf.types import DataError, Prompt

PROMPT_START = 80
"""Characters by which an annotator knows an item again."""

LOOKED_BACK = 300
"""The last rankings of the store, among which those of the last quarter of an hour are looked for."""


@dataclass(frozen=True)
class Progress:
    """How far one annotator is."""

    ranked: int
    skipped: int
    remaining: int
    per_hour: float | None = None
    """From the median time of the last items; None where they are too few."""
    minutes_left: float | None = None
    """At this pace, and with the others at work taking their share."""


@dataclass(frozen=True)
class Past:
    """Something that an annotator ranked or skipped."""

    task_id: int
    prompt_start: str
    state: Literal["ranked", "skipped"]
    at: str
    """ISO 8601."""
    editable: bool
    """Whether it can still be changed."""


def acknowledged(connection: sa.Connection, key: str, assignment_id: int, judgement: Judgement) -> int | None:
    """The ranking saved under this key. Raises DataError where it says something else, or has been taken back."""
    if not key or len(key) > 100:
        raise DataError("the idempotency key must have 1 to 100 characters")
    row = connection.execute(sa.select(rankings).where(rankings.c.idempotency_key == key)).one_or_none()
    if row is None:
        return None
    before = (row.assignment_id, tuple(row.ranks), row.flags, row.rationale)
    if before != (assignment_id, judgement.ranks, judgement.flags, judgement.rationale):
        raise Conflict("this page has already saved another ranking: reload it to change what you said")
    if not row.active and _last_version(connection, assignment_id) == row.version:
        raise Conflict("this ranking was taken back: reload the page to rank the task again")
    return row.id


def _last_version(connection: sa.Connection, assignment_id: int) -> int | None:
    mine = rankings.c.assignment_id == assignment_id
    return connection.scalar(sa.select(sa.func.max(rankings.c.version)).where(mine))


def saved_at(connection: sa.Connection, assignment_id: int) -> float | None:
    """Unix time of the ranking that stands; None where there is none, or nobody can tell when it was."""
    mine = (rankings.c.assignment_id == assignment_id, rankings.c.active)
    return _unix(connection.scalar(sa.select(rankings.c.created_at).where(*mine)))


def seconds_before(connection: sa.Connection, assignment_id: int) -> float:
    """Seconds that earlier versions of a ranking took together."""
    mine = rankings.c.assignment_id == assignment_id
    return connection.scalar(sa.select(sa.func.sum(rankings.c.seconds)).where(mine)) or 0.0


def past(connection: sa.Connection, given: Assignment, policy: Policy, now: float, edit_seconds: float) -> Past:
    """What became of an assignment that is no longer in hand."""
    prompt = connection.scalars(sa.select(items.c.prompt).where(items.c.id == given.item_id)).one()
    if given.state == SKIPPED:
        at = connection.scalars(sa.select(events.c.at).where(events.c.id == given.event)).one()
        editable = assignment.has_place(connection, given, policy, now)
        return Past(given.id, _start(prompt), "skipped", at, editable)
    saved = saved_at(connection, given.id)
    editable = saved is None or now - saved <= edit_seconds
    return Past(given.id, _start(prompt), "ranked", "" if saved is None else iso(saved), editable)


def _start(prompt: Prompt) -> str:
    """How the prompt begins; of a conversation the last turn, for the first is often the same."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " ".join(text[: 4 * PROMPT_START].split())[:PROMPT_START]


# ----------------------------------------------------------------------------------------------------- progress


def progress(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> Progress:
    """How many items of the round an annotator has ranked and skipped and could still rank, and how fast they are.

    Gold items and repeats count as any other, so that the numbers do not tell them apart.
    """
    shown = assignment.shown(connection, annotator, policy)
    states = Counter(each.state for each in shown)
    spaces = places.spaces(connection, annotator, policy, now)
    held, tasks = assignment.held(connection, annotator, policy, now), sum(spaces.values())
    gold_left = hidden.gold_left(connection, annotator) if policy.gold_rate else 0
    left = hidden.upcoming(policy.plan(annotator), shown, tasks, gold_left)
    mine = pace.per_hour(_saved(connection, annotator))
    others = _others(connection, annotator, now) if mine else []
    minutes = pace.minutes_left(mine, held, spaces, others, hidden_share=left / tasks - 1 if tasks else 0.0)
    return Progress(states[DONE] + states[LATE], states[SKIPPED], held + left, mine, minutes)


def _saved(connection: sa.Connection, annotator: str) -> list[tuple[float, float | None]]:
    """When the annotator's last rankings were saved, and how long they took on the page, oldest first."""
    last = (
        sa.select(assignments.c.id)
        .where(assignments.c.annotator == annotator, assignments.c.state.in_([DONE, LATE]))
        .order_by(assignments.c.event.desc())
        .limit(2 * pace.LAST)
    )
    standing = sa.select(rankings.c.created_at, rankings.c.seconds).where(rankings.c.active)
    rows = connection.execute(standing.where(rankings.c.assignment_id.in_(last.scalar_subquery())))
    known = [(at, row.seconds) for row in rows if (at := _unix(row.created_at)) is not None]
    return sorted(known, key=lambda each: each[0])


def _others(connection: sa.Connection, annotator: str, now: float) -> list[float]:
    """Items per hour of everyone else who has been at work within the last quarter of an hour."""
    last = (
        sa.select(rankings.c.assignment_id, rankings.c.created_at)
        .order_by(rankings.c.id.desc())
        .limit(LOOKED_BACK)
        .subquery()
    )
    rows = connection.execute(
        sa.select(sa.func.count())
        .select_from(last.join(assignments, assignments.c.id == last.c.assignment_id))
        .where(last.c.created_at >= iso(now - pace.PAUSE), assignments.c.annotator != annotator)
        .group_by(assignments.c.annotator)
    )
    return [row[0] * 3600 / pace.PAUSE for row in rows]


# ----------------------------------------------------------------------------------------------------- time


def iso(at: float) -> str:
    """Unix time as it is stored: ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _unix(text: str | None) -> float | None:
    """Unix time of an ISO date; None for what is none, as an imported ranking may have."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()

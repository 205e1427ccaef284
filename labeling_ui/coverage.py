"""How far the work is: places taken and free by round, who holds what, what was put away, and how fast it goes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui import pace
from labeling_ui.hidden import GOLD_ROUND
from labeling_ui.history import iso
from labeling_ui.places import DONE, OPEN, SKIPPED, Policy
from labeling_ui.quality import TOO_FAST
from labeling_ui.said import FLAGS
from rlhf.judgements import ADJUDICATION, LATE, TASK
from rlhf.schema import assignments, items, rankings

NEWEST = 50
"""Flagged rankings and open items that are listed one by one."""

Count = sa.func.count()


@dataclass(frozen=True)
class Coverage:
    """The items of one round that want the same number of annotators."""

    round: int
    overlap: int
    items: int
    complete: int
    """Items that as many have ranked as are wanted."""
    wanted: int
    """Rankings, as are the two that follow."""
    done: int
    in_hand: int
    """Handed out, and the lease still runs."""

    @property
    def free(self) -> int:
        """Rankings for which nobody has anything in hand."""
        return max(self.wanted - self.done - self.in_hand, 0)


@dataclass(frozen=True)
class Held:
    """An item in somebody's hands. `minutes`: since it was shown last; None where nobody knows."""

    annotator: str
    item_id: int
    kind: str
    minutes: float | None
    expired: bool
    """Whether its lease has run out: others may take its place."""


@dataclass(frozen=True)
class Flagged:
    """A ranking whose annotator had something to say besides."""

    item_id: int
    annotator: str
    flags: tuple[str, ...]
    note: str | None
    at: str


@dataclass(frozen=True)
class Overview:
    """The state of the queue. Counts are of ordinary items; gold items and repeats are the annotators' affair."""

    coverage: tuple[Coverage, ...]
    held: tuple[Held, ...]
    """The longest held first; at most `NEWEST`."""
    held_count: int
    expired: int
    """How many of those held have a lease that has run out."""
    flagged: tuple[Flagged, ...]
    """The newest first; at most `NEWEST`."""
    flags: dict[str, int]
    """How often each was raised, in rankings that stand."""
    skipped: int
    late: int
    too_fast: int
    adjudicated: int
    hours: tuple[tuple[str, int], ...]
    """Rankings by the hour (`2026-01-31T09`, UTC) in which they were saved, the first hour first."""
    per_hour: float | None
    """Rankings per hour in the last quarter of an hour; None where they were too few to say."""

    @property
    def days(self) -> tuple[tuple[str, int], ...]:
        """Rankings by day."""
        found: Counter[str] = Counter()
        for hour, count in self.hours:
            found[hour[:10]] += count
        return tuple(sorted(found.items()))

    @property
    def remaining(self) -> int:
        """Rankings still wanted, those that are in somebody's hands included."""
        return sum(max(each.wanted - each.done, 0) for each in self.coverage)

    @property
    def minutes_left(self) -> float | None:
        """Until nothing is wanted, at this pace."""
        return 60 * self.remaining / self.per_hour if self.per_hour else None


def overview(connection: sa.Connection, policy: Policy, now: float) -> Overview:
    """Everything that the queue's page shows; `now` is unix time. Overlaps are those of `policy`, in every round."""
    held = sorted(_held(connection, now), key=lambda each: -(each.minutes or 0.0))
    said = _said(connection)
    recent = connection.scalars(_standing(Count).where(rankings.c.created_at >= iso(now - pace.PAUSE))).one()
    return Overview(
        coverage=tuple(_coverage(connection, policy, now)),
        held=tuple(held[:NEWEST]),
        held_count=len(held),
        expired=sum(each.expired for each in held),
        flagged=_flagged(said),
        flags={name: count for name, count in _flag_counts(row.flags for row in said).items() if count},
        skipped=_assignments(connection, state=SKIPPED, kind=TASK),
        late=_assignments(connection, state=LATE),
        too_fast=sum(TOO_FAST in row.marks for row in said),
        adjudicated=_adjudicated(connection),
        hours=_hours(connection),
        per_hour=recent * 3600 / pace.PAUSE if recent >= pace.ENOUGH else None,
    )


def _coverage(connection: sa.Connection, policy: Policy, now: float) -> list[Coverage]:
    live = sa.and_(assignments.c.state == OPEN, assignments.c.leased_until > now)
    taken = (
        sa.select(
            assignments.c.item_id,
            sa.func.sum(sa.case((assignments.c.state == DONE, 1), else_=0)).label("done"),
            sa.func.sum(sa.case((live, 1), else_=0)).label("in_hand"),
        )
        .where(assignments.c.kind == TASK)
        .group_by(assignments.c.item_id)
        .subquery()
    )
    query = (
        sa.select(items.c.id, items.c.round, taken.c.done, taken.c.in_hand)
        .outerjoin(taken, taken.c.item_id == items.c.id)
        .where(items.c.round != GOLD_ROUND)
    )
    groups: dict[tuple[int, int], list[sa.Row]] = defaultdict(list)
    for row in connection.execute(query):
        groups[row.round, policy.wanted(row.id)].append(row)
    return [_group(*key, groups[key]) for key in sorted(groups)]


def _group(round: int, overlap: int, rows: Sequence[sa.Row]) -> Coverage:
    done = [row.done or 0 for row in rows]
    return Coverage(
        round=round,
        overlap=overlap,
        items=len(rows),
        complete=sum(count >= overlap for count in done),
        wanted=overlap * len(rows),
        done=sum(min(count, overlap) for count in done),  # imported rankings may be more than are wanted
        in_hand=sum(row.in_hand or 0 for row in rows),
    )


def _held(connection: sa.Connection, now: float) -> list[Held]:
    rows = connection.execute(sa.select(assignments).where(assignments.c.state == OPEN))
    return [
        Held(
            annotator=row.annotator,
            item_id=row.item_id,
            kind=row.kind,
            minutes=None if row.shown_at is None else (now - row.shown_at) / 60,
            expired=row.leased_until <= now,
        )
        for row in rows
    ]


def _standing(*columns: Any) -> sa.Select[*tuple[Any, ...]]:
    """`columns` of the rankings of ordinary items that stand."""
    return (
        sa.select(*columns)
        .select_from(rankings.join(assignments, rankings.c.assignment_id == assignments.c.id))
        .where(rankings.c.active, assignments.c.kind == TASK)
    )


def _said(connection: sa.Connection) -> list[sa.Row]:
    """Rankings with flags or marks, the newest first."""
    columns = (
        rankings.c.flags,
        rankings.c.marks,
        rankings.c.created_at,
        assignments.c.annotator,
        assignments.c.item_id,
    )
    something = sa.or_(sa.cast(rankings.c.flags, sa.Text) != "{}", sa.cast(rankings.c.marks, sa.Text) != "[]")
    return list(connection.execute(_standing(*columns).where(something).order_by(rankings.c.id.desc())))


def _flagged(rows: Iterable[sa.Row]) -> tuple[Flagged, ...]:
    found = []
    for row in rows:
        raised = tuple(name for name in FLAGS if row.flags.get(name) is True)
        if raised or row.flags.get("note"):
            found.append(Flagged(row.item_id, row.annotator, raised, row.flags.get("note"), row.created_at))
    return tuple(found[:NEWEST])


def _flag_counts(flags: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counts = dict.fromkeys((*FLAGS, "note"), 0)
    for each in flags:
        for name in counts:
            counts[name] += bool(each.get(name))
    return counts


def _assignments(connection: sa.Connection, **values: str) -> int:
    wanted = [assignments.c[name] == value for name, value in values.items()]
    return connection.scalars(sa.select(Count).select_from(assignments).where(*wanted)).one()


def _adjudicated(connection: sa.Connection) -> int:
    query = sa.select(sa.func.count(assignments.c.item_id.distinct())).select_from(
        rankings.join(assignments, rankings.c.assignment_id == assignments.c.id)
    )
    return connection.scalars(query.where(rankings.c.active, assignments.c.kind == ADJUDICATION)).one()


def _hours(connection: sa.Connection) -> tuple[tuple[str, int], ...]:
    hour = sa.func.substr(rankings.c.created_at, 1, 13)
    rows = connection.execute(_standing(hour, Count).group_by(hour).order_by(hour))
    return tuple((row[0], row[1]) for row in rows)

"""Room for annotators: how many an item wants, and how many have ranked it or hold it.

Every function runs inside one transaction of the store, so what it reads is still true when it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from labeling_ui import chance
from labeling_ui.hidden import GOLD_ROUND, Plan
from rlhf.judgements import TASK
from rlhf.schema import assignments, completions, items

OPEN, DONE, SKIPPED = "open", "done", "skipped"
"""States of an assignment; the fourth is LATE: ranked after its place had gone to others."""


@dataclass(frozen=True)
class Policy:
    """How items are shared out."""

    overlap: int = 1
    overlap_share: float = 0.0
    """Share of items that get one annotator more than `overlap`."""
    round: int = 0
    seed: int = 0
    lease_seconds: float = 1800.0
    """How long an item that was handed out and not ranked holds its place."""
    gold_rate: float = 0.0
    """Share of an annotator's items whose answer is known."""
    repeat_rate: float = 0.0
    """Share of an annotator's items that they have ranked before."""

    def wanted(self, item_id: int) -> int:
        """How many annotators are to rank an item."""
        return self.overlap + (chance.place(item_id, "overlap", self.seed) < int(self.overlap_share * chance.PRIME))

    def plan(self, annotator: str) -> Plan:
        """Where this annotator's gold items and repeats come."""
        return Plan(annotator, self.gold_rate, self.repeat_rate, self.seed)


def taken_by_others(connection: sa.Connection, item_id: int, assignment_id: int, now: float) -> int:
    """How many places of an item are taken, leaving one assignment aside."""
    others = (assignments.c.item_id == item_id, assignments.c.id != assignment_id, _holds_place(now))
    return connection.scalars(sa.select(sa.func.count()).select_from(assignments).where(*others)).one()


def spaces(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> dict[int, int]:
    """Free places -> number of items that the annotator never had and could rank."""
    rows = connection.execute(_count_free(policy), {"annotator": annotator, "now": now})
    return {row[0]: row[1] for row in rows}


def next_free(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> int | None:
    """The first of these items, in the order that the seed draws for this annotator."""
    order = chance.line("claim", policy.seed, annotator)
    return connection.scalar(_first_free(policy), {"annotator": annotator, "now": now, **order})


def wanted(connection: sa.Connection, policy: Policy, now: float) -> int:
    """How many more rankings the round takes, from whomever they come."""
    room = _room(policy).subquery()
    missing = sa.select(sa.func.sum(room.c.places)).where(room.c.places > 0)
    return connection.scalars(missing, {"now": now}).one() or 0


def most_completions(connection: sa.Connection, policy: Policy) -> int:
    """The most completions that an item of the round, or a gold item, has; 0 where there are none."""
    count = (
        sa.select(sa.func.count().label("completions"))
        .select_from(completions.join(items, completions.c.item_id == items.c.id))
        .where(items.c.round.in_([policy.round, GOLD_ROUND]))
        .group_by(completions.c.item_id)
        .subquery()
    )
    return connection.scalars(sa.select(sa.func.max(count.c.completions))).one() or 0


# Statements with the parameters `annotator` and `now`. To put one together takes as long as to run it: they are kept.


@cache
def _first_free(policy: Policy) -> sa.Select[Any, Any]:
    free = _free(policy)
    return free.order_by(chance.shuffled_later(), items.c.id).limit(1)


@cache
def _count_free(policy: Policy) -> sa.Select[Any, int]:
    free = _free(policy).subquery()
    return sa.select(free.c.places, sa.func.count()).group_by(free.c.places)


def _free(policy: Policy) -> sa.Select[Any, Any]:
    """Items that the annotator never had and that have free places: how many."""
    seen = sa.select(assignments.c.item_id).where(assignments.c.annotator == sa.bindparam("annotator"))
    return _room(policy, items.c.id.not_in(seen), least=1)


def _room(policy: Policy, *which: sa.ColumnElement[bool], least: int | None = None) -> sa.Select[Any, Any]:
    """For each item of the round how many `places` are free, leaving out those with fewer than the `least`."""
    taken = (
        sa.select(assignments.c.item_id, sa.func.count().label("taken"))
        .where(_holds_place(sa.bindparam("now", type_=sa.Float)))
        .group_by(assignments.c.item_id)
        .subquery()
    )
    few = int(policy.overlap_share * chance.PRIME)
    extra = sa.case((chance.shuffled("overlap", policy.seed) < few, 1), else_=0) if few else 0
    places = policy.overlap + extra - sa.func.coalesce(taken.c.taken, 0)
    enough = () if least is None else (places >= least,)
    return (
        sa.select(items.c.id, places.label("places"))
        .outerjoin(taken, taken.c.item_id == items.c.id)
        .where(items.c.round == policy.round, *which, *enough)
    )


def _holds_place(now: Any) -> sa.ColumnElement[bool]:
    """Which assignments take one of the places of their item."""
    live = sa.and_(assignments.c.state == OPEN, assignments.c.leased_until > now)
    return sa.and_(assignments.c.kind == TASK, sa.or_(assignments.c.state == DONE, live))

"""Who ranks which item next: each item by as many annotators as wanted, however many ask at once.

Every function runs inside one write transaction of the store, so what it reads is still true when it writes.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from rlhf.schema import assignments, completions, items
from rlhf.store import add_event, insert
from rlhf.types import DataError

OPEN, DONE, SKIPPED = "open", "done", "skipped"

PRIME = 2_147_483_647
"""2^31 - 1: `id -> (a id + b) mod PRIME` visits ids in an order that looks random and that any database computes."""


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


@dataclass(frozen=True)
class Assignment:
    """One item in one annotator's hands; `presented_order` lists the indices of its completions as shown."""

    id: int
    item_id: int
    annotator: str
    presented_order: tuple[int, ...]
    state: str


def claim(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> Assignment | None:
    """The annotator's open item, the last one touched first, else a new one; None when nothing is left for them.

    `now` is unix time, against which leases are read.
    """
    mine = sa.and_(assignments.c.annotator == annotator, assignments.c.state == OPEN)
    held = connection.execute(
        sa.select(assignments)
        .join(items, assignments.c.item_id == items.c.id)
        .where(mine, items.c.round == policy.round)
        .order_by(assignments.c.event.desc())
        .limit(1)
    ).one_or_none()
    if held is not None:
        _set(connection, held.id, leased_until=now + policy.lease_seconds)
        return _assignment(held)
    order = _shuffled("claim", policy.seed, annotator)
    free = _free(annotator, policy, now).order_by(order, items.c.id).limit(1)
    row = connection.execute(free).one_or_none()
    return None if row is None else _hand_out(connection, row.id, annotator, policy, now)


def remaining(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> int:
    """How many items the annotator could still rank: those in hand, and those that nobody else has taken."""
    held = sa.select(sa.func.count()).select_from(assignments).join(items, assignments.c.item_id == items.c.id)
    mine = (assignments.c.annotator == annotator, assignments.c.state == OPEN, items.c.round == policy.round)
    free = sa.select(sa.func.count()).select_from(_free(annotator, policy, now).subquery())
    return connection.scalars(held.where(*mine)).one() + connection.scalars(free).one()


def wanted(connection: sa.Connection, policy: Policy, now: float) -> int:
    """How many more rankings the round takes, from whomever they come."""
    places = _places(policy, now)
    missing = sa.func.sum(places.c.wanted - places.c.taken)
    return connection.scalars(sa.select(missing).where(places.c.taken < places.c.wanted)).one() or 0


def find(connection: sa.Connection, assignment_id: int, annotator: str) -> Assignment:
    """The annotator's assignment of this id. Raises DataError where it is not theirs."""
    row = connection.execute(
        sa.select(assignments).where(assignments.c.id == assignment_id, assignments.c.annotator == annotator)
    ).one_or_none()
    if row is None:
        raise DataError(f"task {assignment_id} was not given to {annotator!r}: reload the page")
    return _assignment(row)


def last_closed(connection: sa.Connection, annotator: str, policy: Policy) -> Assignment | None:
    """What the annotator ranked or skipped last."""
    row = connection.execute(
        sa.select(assignments)
        .join(items, assignments.c.item_id == items.c.id)
        .where(
            assignments.c.annotator == annotator,
            assignments.c.state.in_([DONE, SKIPPED]),
            items.c.round == policy.round,
        )
        .order_by(assignments.c.event.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else _assignment(row)


def move(
    connection: sa.Connection, assignment: Assignment, state: str, *, leased_until: float = 0.0, **why: Any
) -> None:
    """Put an assignment into another state and log it with the reasons given."""
    event = add_event(connection, state, assignment.annotator, assignment.item_id, assignment=assignment.id, **why)
    _set(connection, assignment.id, state=state, leased_until=leased_until, event=event)


def _hand_out(connection: sa.Connection, item_id: int, annotator: str, policy: Policy, now: float) -> Assignment:
    count = connection.scalars(sa.select(sa.func.count()).where(completions.c.item_id == item_id)).one()
    order = list(range(count))
    random.Random(_number("order", policy.seed, annotator, item_id)).shuffle(order)
    row = {
        "item_id": item_id,
        "annotator": annotator,
        "presented_order": order,
        "state": OPEN,
        "leased_until": now + policy.lease_seconds,
        "event": add_event(connection, "assigned", annotator, item_id, presented_order=order),
    }
    return Assignment(insert(connection, assignments, row), item_id, annotator, tuple(order), OPEN)


def _free(annotator: str, policy: Policy, now: float) -> sa.Select[tuple[int]]:
    """Items that the annotator never had and that fewer annotators than wanted have ranked or hold."""
    places = _places(policy, now)
    seen = sa.select(assignments.c.item_id).where(assignments.c.annotator == annotator)
    return (
        sa.select(items.c.id)
        .join(places, places.c.id == items.c.id)
        .where(places.c.taken < places.c.wanted, items.c.id.not_in(seen))
    )


def _places(policy: Policy, now: float) -> sa.Subquery:
    """For each item of the round, how many annotators are `wanted` and how many have `taken` it."""
    live = sa.and_(assignments.c.state == OPEN, assignments.c.leased_until > now)
    taken = (
        sa.select(assignments.c.item_id, sa.func.count().label("taken"))
        .where(sa.or_(assignments.c.state == DONE, live))
        .group_by(assignments.c.item_id)
        .subquery()
    )
    extra = sa.case((_shuffled("overlap", policy.seed) < int(policy.overlap_share * PRIME), 1), else_=0)
    return (
        sa.select(
            items.c.id,
            sa.func.coalesce(taken.c.taken, 0).label("taken"),
            (extra + policy.overlap).label("wanted"),
        )
        .outerjoin(taken, taken.c.item_id == items.c.id)
        .where(items.c.round == policy.round)
        .subquery()
    )


def _shuffled(*key: object) -> sa.ColumnElement[int]:
    """A number from 0 to PRIME - 1 for each item, in an order that the key decides."""
    number = _number(*key)
    factor, offset = 1 + number % (PRIME - 1), number // PRIME % PRIME
    return (sa.cast(items.c.id, sa.BigInteger) * factor + offset) % PRIME


def _number(*key: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16])


def _set(connection: sa.Connection, assignment_id: int, **values: Any) -> None:
    connection.execute(sa.update(assignments).where(assignments.c.id == assignment_id).values(values))


def _assignment(row: sa.Row) -> Assignment:
    return Assignment(row.id, row.item_id, row.annotator, tuple(row.presented_order), row.state)

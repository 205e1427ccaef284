"""Who ranks which item next: each item by as many annotators as wanted, however many ask at once.

An item has as many places as annotators are wanted. A place is taken by who has ranked the item, and for the time of a
lease by who holds it. Every way to a place (a hand-out, a lease that is renewed after it ran out, a late submit) looks
first whether one is free, so that there is never one ranking too many. Gold items and repeats take no place.

Every function runs inside one transaction of the store, so what it reads is still true when it writes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa

from labeling_ui import chance, hidden, places
from labeling_ui.places import DONE, OPEN, SKIPPED, Policy
from labeling_ui.refusals import Conflict, NotAllowed
from rlhf.event_log import add_event
from rlhf.judgements import GOLD, LATE, REPEAT, TASK, insert
from rlhf.schema import assignments, completions, items


@dataclass(frozen=True)
class Assignment:
    """One item in one annotator's hands; `presented_order` lists the indices of its completions as shown."""

    id: int
    item_id: int
    annotator: str
    kind: str
    presented_order: tuple[int, ...]
    state: str
    leased_until: float
    shown_at: float | None
    """Unix time of the last hand-out; None where it came from elsewhere."""
    event: int
    """The last that touched it."""

    def in_hand(self, now: float) -> bool:
        """Whether the annotator is ranking it: for the first time, or once more."""
        return self.state == OPEN or self.leased_until > now


# ------------------------------------------------------------------------------------------------- what comes next


def claim(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> Assignment | None:
    """What the annotator has in hand, the last one touched first, else a new item; None when nothing is left for them.

    `now` is unix time, against which leases are read.
    """
    for held in _in_hand(connection, annotator, policy, now):
        if renew(connection, held, policy, now):
            return held
    item_id, kind = _next_item(connection, annotator, policy, now)
    return None if item_id is None else _hand_out(connection, item_id, annotator, kind, policy, now)


def renew(connection: sa.Connection, given: Assignment, policy: Policy, now: float) -> bool:
    """Begin the lease of something in hand anew; False where it ran out and others took the place."""
    if given.leased_until <= now and not has_place(connection, given, policy, now):
        return False
    _set(connection, given.id, leased_until=now + policy.lease_seconds)
    return True


def has_place(connection: sa.Connection, given: Assignment, policy: Policy, now: float) -> bool:
    """Whether the annotator's ranking would be one of those wanted, as things stand.

    Asked even while a lease runs: the clocks of two servers may differ, and `overlap` may have been lowered.
    """
    if given.kind != TASK or given.state == DONE:
        return True
    return places.taken_by_others(connection, given.item_id, given.id, now) < policy.wanted(given.item_id)


def _next_item(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> tuple[int | None, str]:
    """A new item and its kind. All kinds are looked for each time: how long it takes must not tell what comes."""
    found = {TASK: places.next_free(connection, annotator, policy, now)}
    if policy.gold_rate:
        found[GOLD] = hidden.next_gold(connection, annotator, policy.seed)
    if policy.repeat_rate:
        found[REPEAT] = hidden.next_repeat(connection, annotator, policy.round, policy.seed)
    shown = _mine(annotator, policy).with_only_columns(sa.func.count())
    kind = policy.plan(annotator).kind(connection.scalars(shown).one())
    if found[TASK] is None or found.get(kind) is None:
        kind = TASK  # nobody is kept for the sake of a hidden item
    return found[kind], kind


def _hand_out(
    connection: sa.Connection, item_id: int, annotator: str, kind: str, policy: Policy, now: float
) -> Assignment:
    count = connection.scalars(sa.select(sa.func.count()).where(completions.c.item_id == item_id)).one()
    order = _order(count, "order", policy.seed, annotator, item_id)
    if kind == REPEAT:
        order = _other_order(order, policy.seed, annotator, item_id)
    row = {
        "item_id": item_id,
        "annotator": annotator,
        "kind": kind,
        "presented_order": order,
        "state": OPEN,
        "leased_until": now + policy.lease_seconds,
        "shown_at": now,
        "event": add_event(connection, "assigned", annotator, item_id, assignment_kind=kind, presented_order=order),
    }
    row["id"] = insert(connection, assignments, row)
    return _assignment(row)


def _order(count: int, *key: object) -> list[int]:
    order = list(range(count))
    random.Random(chance.number(*key)).shuffle(order)
    return order


def _other_order(first: list[int], *key: object) -> list[int]:
    """An order in which the first one's best guess, to say the same again, goes wrong."""
    drawn = _order(len(first), "again", *key)
    return first[::-1] if drawn == first else drawn


def held(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> int:
    """How many items that are not ranked the annotator has in hand."""
    found = _in_hand(connection, annotator, policy, now)
    return sum(each.state == OPEN and has_place(connection, each, policy, now) for each in found)


def shown(connection: sa.Connection, annotator: str, policy: Policy) -> list[hidden.Shown]:
    """What the annotator was handed out, in the order of positions."""
    kinds = _mine(annotator, policy).with_only_columns(assignments.c.kind, assignments.c.state)
    rows = connection.execute(kinds.order_by(assignments.c.id))
    return [hidden.Shown(row.kind, row.state) for row in rows]


# ------------------------------------------------------------------------------------------------- single ones


def find(connection: sa.Connection, assignment_id: int, annotator: str, policy: Policy) -> Assignment:
    """The annotator's assignment of this id. Raises DataError where it is not theirs."""
    row = connection.execute(_mine(annotator, policy).where(assignments.c.id == assignment_id)).one_or_none()
    if row is None:
        raise NotAllowed(f"task {assignment_id} was not given to {annotator!r}: reload the page")
    return _assignment(row._mapping)


def closed(connection: sa.Connection, annotator: str, policy: Policy, now: float, limit: int) -> list[Assignment]:
    """What the annotator ranked or skipped, the last one first; what is in hand again is left out."""
    rows = connection.execute(
        _mine(annotator, policy)
        .where(assignments.c.state != OPEN, assignments.c.leased_until <= now)
        .order_by(assignments.c.event.desc())
        .limit(limit)
    )
    return [_assignment(row._mapping) for row in rows]


def reopen(connection: sa.Connection, given: Assignment, policy: Policy, now: float) -> None:
    """Put something into the annotator's hands again; a ranking of it stands until another is given.

    Raises DataError for what was skipped and has gone to others.
    """
    state = OPEN if given.state == SKIPPED else given.state
    if given.state == SKIPPED and not has_place(connection, given, policy, now):
        raise Conflict("others have taken what you skipped: there is nothing left to do on it")
    move(connection, given, state, leased_until=now + policy.lease_seconds, shown_at=now, reopened=given.state)


def take_back(connection: sa.Connection, given: Assignment, policy: Policy, now: float) -> None:
    """Put a ranking that was withdrawn into the annotator's hands again.

    One that counted keeps its place for a lease; one that was late has none, and is put away if nothing more is said.
    """
    state = SKIPPED if given.state == LATE else OPEN
    move(connection, given, state, leased_until=now + policy.lease_seconds, shown_at=now, undone=given.state)


def move(
    connection: sa.Connection,
    given: Assignment,
    state: str,
    *,
    leased_until: float = 0.0,
    shown_at: float | None = None,
    **why: Any,
) -> None:
    """Put an assignment into another state and log it with the reasons given."""
    event = add_event(connection, state, given.annotator, given.item_id, assignment=given.id, **why)
    when = {} if shown_at is None else {"shown_at": shown_at}
    _set(connection, given.id, state=state, leased_until=leased_until, event=event, **when)


# ------------------------------------------------------------------------------------------------- queries


def _mine(annotator: str, policy: Policy) -> sa.Select[Any]:
    return (
        sa.select(assignments)
        .join(items, assignments.c.item_id == items.c.id)
        .where(assignments.c.annotator == annotator, hidden.visible(policy.round))
    )


def _in_hand(connection: sa.Connection, annotator: str, policy: Policy, now: float) -> list[Assignment]:
    """What the annotator has in hand, the last one touched first; leases of open ones may have run out."""
    in_hand = sa.or_(assignments.c.state == OPEN, assignments.c.leased_until > now)
    rows = connection.execute(_mine(annotator, policy).where(in_hand).order_by(assignments.c.event.desc()))
    return [_assignment(row._mapping) for row in rows]


def _set(connection: sa.Connection, assignment_id: int, **values: Any) -> None:
    connection.execute(sa.update(assignments).where(assignments.c.id == assignment_id).values(values))


def _assignment(row: Any) -> Assignment:
    values: dict[str, Any] = {each.name: row[each.name] for each in fields(Assignment)}
    return Assignment(**{**values, "presented_order": tuple(values["presented_order"])})

"""Whether a label store still says what was said: its log is unbroken, and the tables agree with the log.

A change by someone who can compute hashes too, and who rewrites the log from there to its end, shows only against an
earlier head: `rlhf data verify` prints the head, and every export's card holds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from rlhf.event_log import (
    ERASED,
    FORGET,
    GENESIS,
    ITEM,
    MIGRATED,
    RANKING,
    SAID,
    WITHDRAWN,
    canonical,
    event_hash,
    head,
    payload_hash,
)
from rlhf.judgements import LATE, completions_of, item_key
from rlhf.schema import assignments, events, items, payloads, rankings
from rlhf.types import DataError


@dataclass(frozen=True)
class Verdict:
    """What a store's log holds, and each place where something does not fit."""

    events: int
    erased: int
    """Events of people who were erased: their hashes hold, what they said is gone."""
    rankings: int
    head: str
    """`number:hash` of the last event: a later verification can be asked whether it is still there."""
    faults: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing was changed."""
        return not self.faults


@dataclass
class _Replay:
    """What the events, one after the other, say about the tables."""

    said: dict[int, tuple[str | None, int | None, dict[str, Any]]] = field(default_factory=dict)
    """By event: annotator, item and columns of a ranking."""
    stands: dict[int, int] = field(default_factory=dict)
    """By assignment: the event of the ranking that stands."""
    keys: dict[int, str] = field(default_factory=dict)
    """By item: the fingerprint of what it was."""
    gone: set[int] = field(default_factory=set)
    """Events without a body."""
    excused: set[int] = field(default_factory=set)
    """Events that an erasure names."""
    cleared: set[int] = field(default_factory=set)
    """Items that may be gone: they were there when a stage was done again, and only those that were shown stayed."""

    def take(self, row: sa.Row) -> None:
        payload = json.loads(row.body)
        if row.kind == RANKING:
            self.said[row.id] = (row.annotator, row.item_id, payload)
            self.stands[payload["assignment_id"]] = row.id
        elif row.kind == WITHDRAWN:
            self.stands.pop(payload["assignment_id"], None)
        elif row.kind == FORGET:
            self._forget(set(payload.get("forgotten", ())))
            self.cleared.update(self.keys if payload.get("samples") else ())
        elif row.kind == ERASED:
            self.excused.update(payload["events"])
        elif row.kind == ITEM and row.item_id is not None and "key" in payload:
            self.keys[row.item_id] = payload["key"]
            self.cleared.discard(row.item_id)  # SQLite gives a number again
        elif row.kind == MIGRATED:
            self.keys.update({int(item): key for item, key in payload["keys"].items()})

    def _forget(self, forgotten: set[int]) -> None:
        self.said = {event: said for event, said in self.said.items() if said[2]["assignment_id"] not in forgotten}
        self.stands = {given: event for given, event in self.stands.items() if given not in forgotten}


def verify(connection: sa.Connection, known: str | None = None) -> Verdict:
    """Check the whole log and the tables against it. `known` is the head of an earlier verification.

    Found are: an event or payload that was changed, added, moved or removed; a log that was cut short; a ranking whose
    row differs from its event or has none, or that is called late and was not, or the other way round; an item whose
    texts were changed, that is missing, or that the log does not know; a body that is gone without an erasure.
    """
    replay = _Replay()
    number, last, faults = _chain(connection, replay, known)
    if head(connection) != (number, last):
        faults.append(f"the log was cut short, or written past this program: it ends with event {number}")
    faults += [f"what event {n} says is gone, and no erasure names it" for n in sorted(replay.gone - replay.excused)]
    counted = connection.scalars(sa.select(sa.func.count()).select_from(payloads)).one()
    found = connection.scalars(sa.select(sa.func.count()).select_from(payloads.join(events))).one()
    if counted > found:
        faults.append(f"{counted - found} payloads belong to no event")
    faults += _items(connection, replay)
    told = list(_rankings(connection, replay))
    rows = connection.scalars(sa.select(sa.func.count()).select_from(rankings)).one()
    return Verdict(number, len(replay.gone), rows, f"{number}:{last}", (*faults, *told))


def _chain(connection: sa.Connection, replay: _Replay, known: str | None) -> tuple[int, str, list[str]]:
    """Number and hash of the last event, and what is wrong on the way there."""
    seen, expected = _parsed(known)
    number, last, faults = 0, GENESIS, []
    query = (
        sa.select(events, payloads.c.event_id, payloads.c.annotator, payloads.c.salt, payloads.c.body)
        .outerjoin(payloads, payloads.c.event_id == events.c.id)
        .order_by(events.c.id)
    )
    for row in connection.execution_options(yield_per=1000).execute(query):
        if row.id != number + 1:
            faults.append(f"event {number + 1} is missing")
        faults += _link(row, last)
        faults += _payload(row, replay)
        number, last = row.id, row.hash
        if number == seen and last != expected:
            faults.append(f"event {seen} is not the one that was there: the log was written anew")
    if number < seen:
        faults.append(f"the log ended with event {seen} before, and now ends with event {number}")
    return number, last, faults


def _parsed(known: str | None) -> tuple[int, str]:
    number, _, last = (known or f"0:{GENESIS}").partition(":")
    if not number.isdecimal() or len(last) != len(GENESIS):
        raise DataError(f"{known!r} is no head of a log: give it as `rlhf data verify` printed it, number:hash")
    return int(number), last


def _link(row: sa.Row, last: str) -> Iterator[str]:
    if row.previous != last:
        yield f"event {row.id} does not follow from the one before it"
    columns = {name: getattr(row, name) for name in ("id", "at", "kind", "item_id", "payload_hash", "previous")}
    if event_hash(**columns) != row.hash:
        yield f"event {row.id} was changed"


def _payload(row: sa.Row, replay: _Replay) -> Iterator[str]:
    if row.event_id is None:
        yield f"what event {row.id} says is missing"
    elif row.body is None:
        replay.gone.add(row.id)
    elif payload_hash(row.salt, row.annotator, row.body) != row.payload_hash:
        yield f"what event {row.id} says was changed"
    else:
        replay.take(row)


def _items(connection: sa.Connection, replay: _Replay) -> Iterator[str]:
    texts = completions_of(connection, sa.true())
    for row in connection.execute(sa.select(items)):
        key = item_key(row.prompt, [each.text for each in texts.get(row.id, [])], row.round)
        known = replay.keys.pop(row.id, None)
        if known is None:
            yield f"item {row.id} is not in the log"
        elif not key == row.key == known:
            yield f"item {row.id} was changed"
    yield from (f"item {missing} is missing" for missing in sorted(replay.keys.keys() - replay.cleared))


def _rankings(connection: sa.Connection, replay: _Replay) -> Iterator[str]:
    """Faults of the rankings; JSON is read as text, for a change may have broken it."""
    columns = [sa.cast(each, sa.Text) if isinstance(each.type, sa.JSON) else each for each in rankings.c]
    labelled = [column.label(each.name) for column, each in zip(columns, rankings.c, strict=True)]
    query = (
        sa.select(*labelled, assignments.c.annotator, assignments.c.item_id, assignments.c.state)
        .outerjoin(assignments, rankings.c.assignment_id == assignments.c.id)
        .order_by(rankings.c.id)
    )
    for row in connection.execute(query):
        annotator, item_id, said = replay.said.pop(row.event, (None, None, None))
        if said is None:
            yield f"ranking {row.id} is not in the log"
        elif _columns(row) != canonical(said) or (row.annotator, row.item_id) != (annotator, item_id):
            yield f"ranking {row.id} is not as event {row.event} has it"
        elif row.active != (replay.stands.get(row.assignment_id) == row.event):
            yield f"ranking {row.id} {'stands' if row.active else 'does not stand'}, but the log says otherwise"
        elif row.active and (row.state == LATE) != (LATE in json.loads(row.marks)):
            yield f"ranking {row.id} came {'in time' if row.state == LATE else 'late'}, but its item says otherwise"
    yield from (f"the ranking of event {event} is missing" for event in replay.said)


def _columns(row: sa.Row) -> str | None:
    """A ranking's columns as its event has them; None where they cannot be read."""
    values = row._mapping
    json_columns = {each.name for each in rankings.c if isinstance(each.type, sa.JSON)}
    try:
        return canonical(
            {name: json.loads(values[name] or "null") if name in json_columns else values[name] for name in SAID}
        )
    except ValueError:
        return None

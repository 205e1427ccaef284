"""What annotators said, as rows of the store: each judgement is in the table of rankings and, word by word, in the log.

Every function runs inside one transaction of the store; those that write, inside `Store.write()`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import sqlalchemy as sa

from rlhf.contract import digest
from rlhf.event_log import RANKING, SAID, WITHDRAWN, add_event, now
from rlhf.schema import assignments, completions, items, rankings
from rlhf.types import Completion, Prompt, Ranking

TASK, GOLD, REPEAT, ADJUDICATION = "task", "gold", "repeat", "adjudication"
"""Kinds of assignment: an ordinary one; one whose answer is known; one that the annotator has ranked before; and an
admin's final word on an item."""

LATE = "late"
"""The mark of a ranking that came after its place had gone to others, and the state of its assignment."""


@dataclass(frozen=True)
class Judgement:
    """What one annotator said about one item; `ranks[i]` belongs to completion i as stored, None is set aside."""

    ranks: tuple[int | None, ...]
    presented_order: tuple[int, ...] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    rationale: str | None = None
    seconds: float | None = None
    guideline_version: int = 1
    created_at: str | None = None


def item_key(prompt: Prompt, texts: Sequence[str], round: int) -> str:
    """The fingerprint of an item: the same prompt, texts and round are the same item."""
    return digest(json.dumps([prompt, list(texts), round], sort_keys=True, ensure_ascii=False))


def insert(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> int:
    """Insert one row and return its id."""
    return connection.scalars(sa.insert(table).values(row).returning(table.c.id)).one()


def add_ranking(
    connection: sa.Connection,
    assignment_id: int,
    idempotency_key: str,
    judgement: Judgement,
    marks: Sequence[str] = (),
) -> int:
    """Store a judgement as the assignment's active ranking, superseding what stood, and log it; returns its id.

    `marks` lists what the server noticed about it, such as `late`.
    """
    mine = rankings.c.assignment_id == assignment_id
    last = connection.scalars(sa.select(sa.func.max(rankings.c.version)).where(mine)).one()
    connection.execute(sa.update(rankings).where(mine, rankings.c.active).values(active=False))
    row = {
        **asdict(judgement),
        "assignment_id": assignment_id,
        "idempotency_key": idempotency_key,
        "version": (last or 0) + 1,
        "created_at": judgement.created_at or now(),
        "marks": list(marks),
    }
    return insert(connection, rankings, {**row, "active": True, "event": log_ranking(connection, row)})


def log_ranking(connection: sa.Connection, row: Any) -> int:
    """Write a ranking's columns into an event of its own; returns the event's number."""
    given = sa.select(assignments.c.annotator, assignments.c.item_id).where(assignments.c.id == row["assignment_id"])
    annotator, item_id = connection.execute(given).one()
    return add_event(connection, RANKING, annotator, item_id, **{name: row[name] for name in SAID})


def withdraw(connection: sa.Connection, assignment_id: int) -> bool:
    """Take back the assignment's active ranking, which stays in the store; returns whether there was one."""
    mine = (rankings.c.assignment_id == assignment_id, rankings.c.active)
    if connection.execute(sa.update(rankings).where(*mine).values(active=False)).rowcount == 0:
        return False
    log_withdrawal(connection, assignment_id)
    return True


def log_withdrawal(connection: sa.Connection, assignment_id: int) -> None:
    """Write into the log that no ranking of the assignment stands."""
    given = sa.select(assignments.c.annotator, assignments.c.item_id).where(assignments.c.id == assignment_id)
    annotator, item_id = connection.execute(given).one()
    add_event(connection, WITHDRAWN, annotator, item_id, assignment_id=assignment_id)


def standing(
    connection: sa.Connection,
    *,
    annotators: Sequence[str] | None = None,
    rounds: Sequence[int] | None = None,
    kinds: Sequence[str] = (TASK,),
    resolved: bool = False,
    late: bool = False,
) -> dict[int, Ranking]:
    """The rankings that stand, by id, in an order that does not depend on how they came in. See `Store.rankings`."""
    wanted = sa.true() if rounds is None else items.c.round.in_(list(rounds))
    kinds = [*kinds, ADJUDICATION] if resolved else list(kinds)
    query = (
        sa.select(
            rankings,
            assignments.c.annotator,
            assignments.c.kind,
            items.c.id.label("item"),
            items.c.prompt,
            items.c.round,
        )
        .join(assignments, rankings.c.assignment_id == assignments.c.id)
        .join(items, assignments.c.item_id == items.c.id)
        .where(rankings.c.active, wanted, assignments.c.kind.in_(kinds))
        .order_by(items.c.round, items.c.key, assignments.c.annotator, assignments.c.kind)
    )
    if annotators is not None:
        query = query.where(assignments.c.annotator.in_(list(annotators)))
    if not late:
        query = query.where(assignments.c.state != LATE)
    texts = completions_of(connection, wanted)
    rows = connection.execute(query).all()
    kept = _final_words(rows) if resolved else rows
    return {row.id: _ranking(row, tuple(each.text for each in texts[row.item])) for row in kept}


def _final_words(rows: Sequence[sa.Row]) -> list[sa.Row]:
    """Where an item has been adjudicated, the last adjudication alone; elsewhere everything."""
    last = defaultdict(int)
    for row in rows:
        if row.kind == ADJUDICATION:
            last[row.item] = max(last[row.item], row.id)
    return [row for row in rows if last.get(row.item, row.id) == row.id]


def judgement_of(source: Ranking | sa.Row) -> Judgement:
    """The part of a ranking, or of its row, that the annotator gave."""
    values = {each.name: getattr(source, each.name) for each in fields(Judgement)}
    order = values.pop("presented_order")
    ranks = tuple(values.pop("ranks"))
    return Judgement(ranks=ranks, presented_order=None if order is None else tuple(order), **values)


def _ranking(row: sa.Row, texts: tuple[str, ...]) -> Ranking:
    said = vars(judgement_of(row))
    said["flags"] = {**row.flags, **({"marks": row.marks} if row.marks else {})}
    return Ranking(prompt=row.prompt, completions=texts, annotator=row.annotator, round=row.round, **said)


def completions_of(connection: sa.Connection, wanted: sa.ColumnElement[bool]) -> dict[int, list[Completion]]:
    """The completions of the wanted items, by item and in stored order."""
    query = (
        sa.select(completions)
        .join(items, completions.c.item_id == items.c.id)
        .where(wanted)
        .order_by(completions.c.item_id, completions.c.position)
    )
    found: dict[int, list[Completion]] = {}
    for row in connection.execute(query):
        each = Completion(row.text, row.model, row.seed, row.settings, row.finished)
        found.setdefault(row.item_id, []).append(each)
    return found

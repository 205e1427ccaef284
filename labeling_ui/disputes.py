"""Items on which annotators differ, and the last word on them. An adjudication is a ranking of a kind of its own.

Whoever adjudicates sees the cards blind, in an order of their own, like an annotator; what the annotators said is shown
on demand, and the record says so.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import sqlalchemy as sa

from labeling_ui import assignment, chance, history, said
from labeling_ui.agreement import outcome, ranked_together
from labeling_ui.assignment import Assignment
from labeling_ui.hidden import GOLD_ROUND
from labeling_ui.places import DONE, SKIPPED
from labeling_ui.raters import RaterModel, SoftLabel
from labeling_ui.said import Said, Tiers
from rlhf.data import prompt_key
from rlhf.event_log import add_event
from rlhf.judgements import ADJUDICATION, TASK, Judgement, add_ranking, completions_of, insert, item_key, withdraw
from rlhf.schema import assignments, events, items, payloads, rankings
from rlhf.types import DataError, Prompt, Ranking

REVEALED = "revealed"
"""The event that somebody looked at what the annotators said, and the mark of an adjudication that came after."""

Pair = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class Dispute:
    """How much the annotators of one item differ."""

    key: str
    """The item's fingerprint."""
    prompt: Prompt
    annotators: int
    disagreement: float
    """Mean distance of two annotators' words on two completions: 1 for opposite orders, 1/2 for a tie and an order."""
    doubt: float
    """Bits per pair of completions that their difference leaves open: the entropy of the rater model's label where they
    differ, 0 where they agree. A random clicker against two careful people leaves little."""


def disputes(found: Sequence[Ranking], model: RaterModel) -> list[Dispute]:
    """Items on which annotators differ, those that leave most doubt first."""
    labels = {_pair(label.prompt, label.chosen, label.rejected): label for label in model.labels}
    differing = [_dispute(group, labels) for group in ranked_together(found)]
    return sorted((each for each in differing if each.disagreement), key=lambda each: (-each.doubt, -each.disagreement))


def _pair(prompt: Prompt, one: str, other: str) -> Pair:
    return prompt_key(prompt), frozenset({one, other})


def _dispute(group: Sequence[Ranking], labels: Mapping[Pair, SoftLabel]) -> Dispute:
    first, pairs = group[0], list(_distances(group))
    doubt = [
        labels[key].entropy if distance and (key := _pair(first.prompt, one, other)) in labels else 0.0
        for one, other, distance in pairs
    ]
    return Dispute(
        key=item_key(first.prompt, first.completions, first.round),
        prompt=first.prompt,
        annotators=len({each.annotator for each in group}),
        disagreement=sum(distance for _, _, distance in pairs) / len(pairs) if pairs else 0.0,
        doubt=sum(doubt) / len(doubt) if doubt else 0.0,
    )


def _distances(group: Sequence[Ranking]) -> Iterator[tuple[str, str, float]]:
    """Two completions and how far annotators are apart on them, for those that two annotators compared."""
    texts = group[0].completions
    for i, j in combinations(range(len(texts)), 2):
        words = [value for each in group if (value := outcome(each.ranks[i], each.ranks[j])) is not None]
        gaps = [abs(one - other) for one, other in combinations(words, 2)]
        if gaps:
            yield texts[i], texts[j], sum(gaps) / len(gaps)


# ------------------------------------------------------------------------------------------------ one item


@dataclass(frozen=True)
class Case:
    """A disputed item as an adjudicator sees it: texts without their origin, in the adjudicator's own order."""

    item_id: int
    prompt: Prompt
    completions: tuple[str, ...]
    order: tuple[int, ...]
    """Indices of the stored completions as shown."""
    key: str
    """The idempotency key under which this showing is to be submitted."""
    before: Said | None
    """The adjudicator's own word that stands."""


@dataclass(frozen=True)
class Statement:
    """What one person said of the item, by places as the adjudicator sees them."""

    annotator: str
    kind: str
    said: Said
    marks: tuple[str, ...]
    at: str


def case(connection: sa.Connection, name: str, item_id: int, seed: int) -> Case:
    """The item for this adjudicator. Raises DataError for a gold item, or none."""
    row = connection.execute(sa.select(items).where(items.c.id == item_id)).one_or_none()
    if row is None:
        raise DataError(f"there is no item {item_id}")
    if row.round == GOLD_ROUND:
        raise DataError(f"item {item_id} is a gold item: correct its answer in the file that it came from")
    texts = completions_of(connection, items.c.id == item_id)[item_id]
    order = list(range(len(texts)))
    random.Random(chance.number("adjudicate", seed, name, item_id)).shuffle(order)
    own = [
        each for each in statements(connection, item_id, order) if (each.annotator, each.kind) == (name, ADJUDICATION)
    ]
    return Case(
        item_id=item_id,
        prompt=row.prompt,
        completions=tuple(texts[index].text for index in order),
        order=tuple(order),
        key=uuid.uuid4().hex,
        before=own[0].said if own else None,
    )


def statements(connection: sa.Connection, item_id: int, order: Sequence[int]) -> list[Statement]:
    """Everything that stands on an item, late rankings and adjudications included; `order` as in `Case`."""
    query = (
        sa.select(rankings, assignments.c.annotator, assignments.c.kind)
        .join(assignments, rankings.c.assignment_id == assignments.c.id)
        .where(rankings.c.active, assignments.c.item_id == item_id, assignments.c.kind.in_([TASK, ADJUDICATION]))
        .order_by(assignments.c.kind.desc(), assignments.c.annotator)
    )
    return [
        Statement(
            annotator=row.annotator,
            kind=row.kind,
            said=said.as_said(row.ranks, row.flags, row.rationale, order),
            marks=tuple(row.marks),
            at=row.created_at,
        )
        for row in connection.execute(query)
    ]


def reveal(connection: sa.Connection, name: str, item_id: int) -> None:
    """Put on record that the adjudicator has seen what the annotators said."""
    if not _revealed(connection, name, item_id):
        add_event(connection, REVEALED, annotator=name, item_id=item_id)


def _revealed(connection: sa.Connection, name: str, item_id: int) -> bool:
    query = (
        sa.select(events.c.id)
        .join(payloads, payloads.c.event_id == events.c.id)
        .where(events.c.kind == REVEALED, events.c.item_id == item_id, payloads.c.annotator == name)
    )
    return connection.execute(query.limit(1)).one_or_none() is not None


# ------------------------------------------------------------------------------------------------ the last word


@dataclass(frozen=True)
class Ruling:
    """The acknowledgement of an adjudication."""

    ranking_id: int
    repeated: bool
    """Whether this key had been acknowledged before."""


def adjudicate(
    connection: sa.Connection,
    shown: Case,
    name: str,
    key: str,
    tiers: Tiers,
    aside: Sequence[int],
    *,
    flags: Mapping[str, Any],
    rationale: str | None,
    guideline_version: int,
    now: float,
) -> Ruling:
    """Save the last word on the item as `shown`; it supersedes the adjudicator's own before it. Raises DataError."""
    checked = said.checked_flags(flags, (), shown.order)
    judgement = Judgement(
        ranks=said.checked_ranks(tiers, aside, shown.order, all_aside=any(each in checked for each in said.UNRANKED)),
        presented_order=shown.order,
        flags=checked,
        rationale=said.checked_text("rationale", rationale, said.MAX_RATIONALE),
        guideline_version=guideline_version,
        created_at=history.iso(now),
    )
    given = _assignment(connection, shown, name)
    repeated = history.acknowledged(connection, key, given.id, judgement)
    if repeated is not None:
        return Ruling(repeated, repeated=True)
    marks = [REVEALED] if _revealed(connection, name, shown.item_id) else []
    ranking_id = add_ranking(connection, given.id, key, judgement, marks)
    assignment.move(connection, given, DONE, ranking=ranking_id)
    return Ruling(ranking_id, repeated=False)


def take_back(connection: sa.Connection, item_id: int) -> bool:
    """Let the annotators' rankings count again: no adjudication of the item stands. Returns whether one did."""
    found = sa.select(assignments).where(assignments.c.item_id == item_id, assignments.c.kind == ADJUDICATION)
    stood = [row for row in connection.execute(found).all() if withdraw(connection, row.id)]
    for row in stood:
        assignment.move(connection, _as_assignment(row._mapping), SKIPPED, undone=DONE)
    return bool(stood)


def last_words(connection: sa.Connection) -> dict[str, tuple[int, str | None]]:
    """Of every item, by fingerprint, its id and who has adjudicated it last, if anyone has."""
    query = (
        sa.select(assignments.c.item_id, assignments.c.annotator)
        .join(rankings, rankings.c.assignment_id == assignments.c.id)
        .where(rankings.c.active, assignments.c.kind == ADJUDICATION)
        .order_by(rankings.c.id)
    )
    last: dict[int, str] = {row.item_id: row.annotator for row in connection.execute(query)}
    return {row.key: (row.id, last.get(row.id)) for row in connection.execute(sa.select(items.c.id, items.c.key))}


def _assignment(connection: sa.Connection, shown: Case, name: str) -> Assignment:
    """The adjudicator's assignment of the item, made at the first word on it."""
    mine = (
        assignments.c.item_id == shown.item_id,
        assignments.c.annotator == name,
        assignments.c.kind == ADJUDICATION,
    )
    row = connection.execute(sa.select(assignments).where(*mine)).one_or_none()
    if row is not None:
        return _as_assignment(row._mapping)
    order = list(shown.order)
    values: dict[str, Any] = {
        "item_id": shown.item_id,
        "annotator": name,
        "kind": ADJUDICATION,
        "presented_order": order,
        "state": DONE,
        "leased_until": 0.0,
        "shown_at": None,
        "event": add_event(
            connection, "assigned", name, shown.item_id, assignment_kind=ADJUDICATION, presented_order=order
        ),
    }
    return _as_assignment({**values, "id": insert(connection, assignments, values)})


def _as_assignment(row: Any) -> Assignment:
    return Assignment(**{**row, "presented_order": tuple(row["presented_order"])})

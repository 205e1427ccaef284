"""Gold items and repeats among an annotator's items: when they come is drawn with the seed, and nothing shows it.

An annotator's items are numbered from 0 as they are handed out. The rates cut these positions into blocks, each with
one hidden item at a place that the seed draws: among n positions there are never more than `rate * n + 1`, and nobody
can count them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import sqlalchemy as sa

from labeling_ui import chance
from rlhf.judgements import GOLD, REPEAT, TASK
from rlhf.schema import assignments, gold, items

GOLD_ROUND = -1
"""Where gold items lie: in no round, so that nobody takes them for samples of a model."""

REPEAT_AFTER = 10
"""How many items after the first showing the second comes at the earliest."""


class Plan:
    """At which positions one annotator's hidden items come."""

    def __init__(self, annotator: str, gold_rate: float = 0.0, repeat_rate: float = 0.0, seed: int = 0) -> None:
        golden, repeated = Fraction(str(gold_rate)), Fraction(str(repeat_rate))
        self._rate = golden + repeated
        self._gold_share = golden / self._rate if self._rate else Fraction(0)
        self._key = ("hidden", seed, annotator)
        self._phase = chance.number(*self._key) % self._gold_share.denominator
        self._places: dict[int, int] = {}

    def kind(self, position: int) -> str:
        """What the item at a position is to be; an ordinary one stands in where there is none of that kind."""
        block = position * self._rate.numerator // self._rate.denominator
        if not self._rate or position != self._place(block):
            return TASK
        return GOLD if self._golden(block + 1) > self._golden(block) else REPEAT

    def _place(self, block: int) -> int:
        """The position of a block's hidden item."""
        if block not in self._places:
            first, end = self._first(block), self._first(block + 1)
            self._places[block] = first + chance.number(*self._key, block) % (end - first)
        return self._places[block]

    def _first(self, block: int) -> int:
        return -(-block * self._rate.denominator // self._rate.numerator)

    def _golden(self, block: int) -> int:
        """How many blocks before this one are gold: their share, as evenly as can be, from a drawn beginning."""
        return (block * self._gold_share.numerator + self._phase) // self._gold_share.denominator


@dataclass(frozen=True)
class Shown:
    """One item that was handed out, in the order of the annotator's positions."""

    kind: str
    state: str

    @property
    def repeatable(self) -> bool:
        """Whether it may be shown again: it was ranked and counts, or may yet be."""
        return self.kind == TASK and self.state in ("open", "done")


def upcoming(plan: Plan, shown: Sequence[Shown], tasks: int, gold_left: int) -> int:
    """How many items will be handed out until `tasks` ordinary ones are, with the hidden ones among them.

    What an annotator is told to be left falls by one with each item, whatever it is, so that it tells nothing.
    """
    repeatable = [each.repeatable for each in shown]
    repeats = sum(each.kind == REPEAT for each in shown)
    position = len(shown)
    old = sum(repeatable[: max(position - REPEAT_AFTER + 1, 0)])
    while tasks > 0:
        kind = plan.kind(position)
        if kind == GOLD and gold_left > 0:
            gold_left -= 1
        elif kind == REPEAT and old > repeats:
            repeats += 1
        else:
            kind, tasks = TASK, tasks - 1
        repeatable.append(kind == TASK)
        position += 1
        old += repeatable[position - REPEAT_AFTER] if position >= REPEAT_AFTER else 0
    return position - len(shown)


def gold_for(annotator: str, seed: int) -> sa.Select[tuple[int]]:
    """The gold items of which the annotator has seen neither item nor prompt, in the order that the seed draws."""
    seen = (
        sa.select(items.c.prompt_key)
        .join(assignments, assignments.c.item_id == items.c.id)
        .where(assignments.c.annotator == annotator)
    )
    return (
        sa.select(items.c.id)
        .join(gold, gold.c.item_id == items.c.id)
        .where(items.c.prompt_key.not_in(seen))
        .order_by(chance.shuffled("gold", seed, annotator), items.c.id)
    )


def repeats_for(annotator: str, round: int, seed: int) -> sa.Select[tuple[int]]:
    """The items that the annotator ranked long enough ago, once only, in the order that the seed draws."""
    again = sa.select(assignments.c.item_id).where(assignments.c.annotator == annotator, assignments.c.kind == REPEAT)
    last = (
        sa.select(assignments.c.id)
        .join(items, assignments.c.item_id == items.c.id)
        .where(assignments.c.annotator == annotator, visible(round))
        .order_by(assignments.c.id.desc())
        .offset(REPEAT_AFTER - 1)
        .limit(1)
    )
    return (
        sa.select(items.c.id)
        .join(assignments, assignments.c.item_id == items.c.id)
        .where(
            assignments.c.annotator == annotator,
            assignments.c.kind == TASK,
            assignments.c.state == "done",
            assignments.c.id <= last.scalar_subquery(),
            items.c.round == round,
            items.c.id.not_in(again),
        )
        .order_by(chance.shuffled("repeat", seed, annotator), items.c.id)
    )


def visible(round: int) -> sa.ColumnElement[bool]:
    """What annotators of a round are shown and may change: its items and the gold ones, but no admin's final words."""
    return sa.and_(items.c.round.in_([round, GOLD_ROUND]), assignments.c.kind.in_([TASK, GOLD, REPEAT]))

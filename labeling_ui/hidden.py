"""Gold items and repeats among an annotator's items: when they come is drawn with the seed, and nothing shows it.

An annotator's items are numbered from 0 as they are handed out. The rates cut these positions into blocks, each with
one hidden item at a place that the seed draws: among n positions there are never more than `rate * n + 1`, and nobody
can count them out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, count
from typing import Any

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

    def kind(self, position: int) -> str:
        """What the item at a position is to be; an ordinary one stands in where there is none of that kind."""
        at, kind = next(self.hidden_from(position), (None, TASK))
        return kind if at == position else TASK

    def hidden_from(self, position: int) -> Iterator[tuple[int, str]]:
        """(position, kind) of the hidden items from this position on: without end, unless there are none."""
        if not self._rate:
            return
        for block in count(position * self._rate.numerator // self._rate.denominator):
            place = self._place(block)
            if place >= position:
                yield place, GOLD if self._golden(block + 1) > self._golden(block) else REPEAT

    def _place(self, block: int) -> int:
        """The position of a block's hidden item."""
        first, end = self._first(block), self._first(block + 1)
        return first + chance.number(*self._key, block) % (end - first)

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
    begin, end = len(shown), len(shown) + tasks  # `end` moves by one with each hidden item before it
    before = [0, *accumulate(each.repeatable for each in shown)]
    given: list[int] = []
    repeats = sum(each.kind == REPEAT for each in shown)
    for position, kind in plan.hidden_from(begin):
        if position >= end or not tasks:
            break
        oldest = position - REPEAT_AFTER + 1  # what came before this position can be repeated
        if kind == GOLD and gold_left > 0:
            gold_left -= 1
        elif kind == REPEAT and _repeatable(before, given, oldest) > repeats:
            repeats += 1
        else:
            continue
        given.append(position)
        end += 1
    return end - begin


def _repeatable(before: Sequence[int], given: Sequence[int], oldest: int) -> int:
    """How many ordinary items come before a position: those shown already, and those between `given` hidden ones."""
    begin = len(before) - 1
    if oldest <= begin:
        return before[max(oldest, 0)]
    return before[-1] + oldest - begin - bisect_left(given, oldest)


def next_gold(connection: sa.Connection, annotator: str, seed: int) -> int | None:
    """The first gold item, in the order that the seed draws, whose prompt the annotator has not seen."""
    drawn = chance.line("gold", seed, annotator)
    return connection.scalar(_gold(), {"annotator": annotator, **drawn})


def gold_left(connection: sa.Connection, annotator: str) -> int:
    """How many of these there are."""
    return connection.scalars(_count_gold(), {"annotator": annotator}).one()


def next_repeat(connection: sa.Connection, annotator: str, round: int, seed: int) -> int | None:
    """The first, in the order that the seed draws, of the items that the annotator ranked once and long enough ago."""
    drawn = chance.line("repeat", seed, annotator)
    return connection.scalar(_repeats(round), {"annotator": annotator, **drawn})


def visible(round: int) -> sa.ColumnElement[bool]:
    """What annotators of a round are shown and may change: its items and the gold ones, but no admin's final words."""
    return sa.and_(items.c.round.in_([round, GOLD_ROUND]), assignments.c.kind.in_([TASK, GOLD, REPEAT]))


# Statements with the parameter `annotator`. To put one together takes as long as to run it: they are kept.

_ME = assignments.c.annotator == sa.bindparam("annotator")


@cache
def _gold() -> sa.Select[Any]:
    return _unseen_gold(items.c.id).order_by(chance.shuffled_later(), items.c.id).limit(1)


@cache
def _count_gold() -> sa.Select[Any]:
    return _unseen_gold(sa.func.count())


def _unseen_gold(what: Any) -> sa.Select[Any]:
    seen = sa.select(items.c.prompt_key).join(assignments, assignments.c.item_id == items.c.id).where(_ME)
    return sa.select(what).select_from(gold.join(items)).where(items.c.prompt_key.not_in(seen))


@cache
def _repeats(round: int) -> sa.Select[Any]:
    again = sa.select(assignments.c.item_id).where(_ME, assignments.c.kind == REPEAT)
    handed_out = sa.select(assignments.c.id).join(items, assignments.c.item_id == items.c.id).where(_ME, visible(round))
    last = handed_out.order_by(assignments.c.id.desc()).offset(REPEAT_AFTER - 1).limit(1)
    ranked = (assignments.c.kind == TASK, assignments.c.state == "done", items.c.round == round)
    return (
        sa.select(items.c.id)
        .join(assignments, assignments.c.item_id == items.c.id)
        .where(_ME, *ranked, assignments.c.id <= last.scalar_subquery(), items.c.id.not_in(again))
        .order_by(chance.shuffled_later(), items.c.id)
        .limit(1)
    )

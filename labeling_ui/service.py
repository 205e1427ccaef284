"""What annotators do: take a task, submit a ranking, skip, undo. The page and the simulation call nothing else.

**A submit that returned is on disk, exactly once**: the same idempotency key a second time, after a double click or a
lost answer, changes nothing. The rules are checked here, whatever the page let through.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui import assignment
from labeling_ui.assignment import DONE, OPEN, SKIPPED, Assignment, Policy
from rlhf.schema import assignments, completions, items, rankings
from rlhf.store import Judgement, Store, add_ranking, withdraw
from rlhf.types import DataError, Prompt

FLAGS = {
    "unclear": "The prompt is unclear",
    "all_bad": "All completions are bad",
    "unsafe": "Something here is unsafe",
}
"""What an annotator may say about an item, and how the page words it."""

MAX_RATIONALE = 4000
"""Characters."""

Tiers = Sequence[Sequence[int]]
"""Places on the page, from 0, best tier first; places in one tier are tied."""


@dataclass(frozen=True)
class Said:
    """A ranking in the annotator's own terms: places on the page."""

    tiers: tuple[tuple[int, ...], ...]
    aside: tuple[int, ...]
    flags: dict[str, bool]
    rationale: str | None


@dataclass(frozen=True)
class Task:
    """What an annotator sees: texts without their origin, in the annotator's own order."""

    id: int
    prompt: Prompt
    completions: tuple[str, ...]
    key: str
    """The idempotency key under which this showing of the task is to be submitted."""
    before: Said | None = None
    """What the annotator had said of it before an undo."""


@dataclass(frozen=True)
class Receipt:
    """The acknowledgement of a submit."""

    ranking_id: int
    repeated: bool
    """Whether this key had been acknowledged before."""


@dataclass(frozen=True)
class Progress:
    """How far one annotator is."""

    ranked: int
    skipped: int
    remaining: int


class LabelService:
    """The use cases over one store. `clock` gives unix time; safe to call from several threads and processes."""

    def __init__(
        self, store: Store, policy: Policy, *, guideline_version: int = 1, clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.policy = policy
        self.guideline_version = guideline_version
        self._clock = clock

    def next_task(self, annotator: str) -> Task | None:
        """The task in the annotator's hands, or a new one; None when nothing is left for them.

        The same task comes back, in the same order, until it is submitted or skipped.
        """
        with self.store.write() as connection:
            given = assignment.claim(connection, annotator, self.policy, self._clock())
            return None if given is None else _task(connection, given)

    def submit(
        self,
        annotator: str,
        task_id: int,
        key: str,
        tiers: Tiers,
        aside: Sequence[int] = (),
        *,
        flags: Mapping[str, bool] | None = None,
        rationale: str | None = None,
        seconds: float | None = None,
    ) -> Receipt:
        """Save a ranking and return once it is on disk. Raises DataError, with nothing saved, where it breaks a rule.

        Every place must be in one tier or set `aside`. A task that was ranked before gets a new version.
        """
        with self.store.write() as connection:
            given = assignment.find(connection, task_id, annotator)
            judgement = Judgement(
                ranks=_ranks(tiers, aside, given.presented_order),
                presented_order=given.presented_order,
                flags=_checked_flags(flags or {}),
                rationale=_checked_rationale(rationale),
                seconds=_checked_seconds(seconds),
                guideline_version=self.guideline_version,
            )
            repeated = _acknowledged(connection, key, given, judgement)
            if repeated is not None:
                return Receipt(repeated, repeated=True)
            ranking_id = add_ranking(connection, given.id, key, judgement)
            assignment.move(connection, given, DONE, ranking=ranking_id)
        return Receipt(ranking_id, repeated=False)

    def skip(self, annotator: str, task_id: int, reason: str | None = None) -> None:
        """Put a task away unranked, for others to take; a task that is ranked or skipped already stays as it is."""
        with self.store.write() as connection:
            given = assignment.find(connection, task_id, annotator)
            if given.state == OPEN:
                assignment.move(connection, given, SKIPPED, reason=reason)

    def undo(self, annotator: str) -> int | None:
        """Take back the annotator's last submit or skip and return its task's id; None when there is none.

        The task comes next; its ranking no longer counts but stays in the store.
        """
        with self.store.write() as connection:
            last = assignment.last_closed(connection, annotator, self.policy)
            if last is None:
                return None
            withdraw(connection, last.id)
            until = self._clock() + self.policy.lease_seconds
            assignment.move(connection, last, OPEN, leased_until=until, undone=last.state)
            return last.id

    def progress(self, annotator: str) -> Progress:
        """How many items of the round the annotator has ranked and skipped, and could still rank."""
        query = (
            sa.select(assignments.c.state, sa.func.count())
            .join(items, assignments.c.item_id == items.c.id)
            .where(assignments.c.annotator == annotator, items.c.round == self.policy.round)
            .group_by(assignments.c.state)
        )
        with self.store.read() as connection:
            states = {row[0]: row[1] for row in connection.execute(query)}
            left = assignment.remaining(connection, annotator, self.policy, self._clock())
        return Progress(ranked=states.get(DONE, 0), skipped=states.get(SKIPPED, 0), remaining=left)

    def wanted(self) -> int:
        """How many rankings the round still needs, whoever gives them."""
        with self.store.read() as connection:
            return assignment.wanted(connection, self.policy, self._clock())


def _task(connection: sa.Connection, given: Assignment) -> Task:
    prompt = connection.scalars(sa.select(items.c.prompt).where(items.c.id == given.item_id)).one()
    mine = completions.c.item_id == given.item_id
    texts = connection.scalars(sa.select(completions.c.text).where(mine).order_by(completions.c.position)).all()
    shown = tuple(texts[index] for index in given.presented_order)
    return Task(given.id, prompt, shown, uuid.uuid4().hex, _said_before(connection, given))


def _said_before(connection: sa.Connection, given: Assignment) -> Said | None:
    last = connection.execute(
        sa.select(rankings).where(rankings.c.assignment_id == given.id).order_by(rankings.c.version.desc()).limit(1)
    ).one_or_none()
    if last is None:
        return None
    shown = [last.ranks[index] for index in given.presented_order]
    levels = sorted({rank for rank in shown if rank is not None})
    tiers = tuple(tuple(place for place, rank in enumerate(shown) if rank == level) for level in levels)
    aside = tuple(place for place, rank in enumerate(shown) if rank is None)
    return Said(tiers, aside, last.flags, last.rationale)


def _ranks(tiers: Tiers, aside: Sequence[int], presented_order: Sequence[int]) -> tuple[int | None, ...]:
    """Ranks in stored order from places on the page; raises DataError unless every place is used once."""
    count = len(presented_order)
    placed = [place for tier in tiers for place in tier]
    used = [*placed, *aside]
    if any(isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < count for place in used):
        raise DataError(f"places {used} are not those of {count} completions")
    if sorted(used) != list(range(count)):
        raise DataError("rank each completion once, or set it aside")
    if len(placed) < 2:
        raise DataError("rank at least two completions, or skip the task")
    ranks: list[int | None] = [None] * count
    for rank, tier in enumerate((tier for tier in tiers if tier), start=1):
        for place in tier:
            ranks[presented_order[place]] = rank
    return tuple(ranks)


def _acknowledged(connection: sa.Connection, key: str, given: Assignment, judgement: Judgement) -> int | None:
    """The ranking saved under this key; raises DataError where it says something else."""
    if not key or len(key) > 100:
        raise DataError("the idempotency key must have 1 to 100 characters")
    row = connection.execute(sa.select(rankings).where(rankings.c.idempotency_key == key)).one_or_none()
    if row is None:
        return None
    before = (row.assignment_id, tuple(row.ranks), row.flags, row.rationale)
    if before != (given.id, judgement.ranks, judgement.flags, judgement.rationale):
        raise DataError("this page has already saved another ranking: reload it to change what you said")
    return row.id


def _checked_flags(flags: Mapping[str, Any]) -> dict[str, bool]:
    if unknown := set(flags) - set(FLAGS):
        raise DataError(f"there is no flag {sorted(unknown)[0]!r}; known are {', '.join(FLAGS)}")
    return {name: True for name in FLAGS if flags.get(name) is True}


def _checked_rationale(rationale: str | None) -> str | None:
    if rationale is not None and len(rationale) > MAX_RATIONALE:
        raise DataError(f"the rationale has {len(rationale)} characters; {MAX_RATIONALE} are allowed")
    return (rationale or "").strip() or None


def _checked_seconds(seconds: float | None) -> float | None:
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise DataError(f"seconds is {seconds!r}, but it must be 0 or more")
    return seconds

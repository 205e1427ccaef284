"""What annotators do: take a task, submit a ranking, skip, undo, edit. The page and the simulation call nothing else.

**A submit that returned is on disk, exactly once**: the same idempotency key a second time, after a double click or a
lost answer, changes nothing. The rules are checked here, whatever the page let through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui import assignment, diff, drafts, guidelines, history, places, quality, said, task
from labeling_ui.assignment import Assignment
from labeling_ui.guidelines import Onboarding, QuizResult
from labeling_ui.history import Past, Progress, iso
from labeling_ui.places import DONE, OPEN, SKIPPED, Policy
from labeling_ui.refusals import Conflict, NotAllowed
from labeling_ui.said import FLAGS, Said, Tiers
from labeling_ui.task import Task
from rlhf.judgements import LATE, Judgement, add_ranking, withdraw
from rlhf.schema import users
from rlhf.store import Store
from rlhf.types import DataError

__all__ = ["FLAGS", "LabelService", "Past", "Progress", "Receipt", "Said", "Task"]


@dataclass(frozen=True)
class Receipt:
    """The acknowledgement of a submit."""

    ranking_id: int
    repeated: bool
    """Whether this key had been acknowledged before."""


class LabelService:
    """The use cases over one store; safe to call from several threads and processes. Every method raises DataError
    for what is not the annotator's own.

    `clock` gives unix time. `criteria` are what completions may be rated for. `words_per_second` None marks nothing as
    too fast. `quiz` False lets annotators begin without the quiz of the guidelines.
    """

    def __init__(
        self,
        store: Store,
        policy: Policy,
        *,
        guideline_version: int = 1,
        clock: Callable[[], float] = time.time,
        criteria: Sequence[str] = (),
        words_per_second: float | None = None,
        edit_minutes: float = 60.0,
        quiz: bool = True,
    ) -> None:
        self.store = store
        self.policy = policy
        self.guideline_version = guideline_version
        self.criteria = tuple(criteria)
        self.words_per_second = words_per_second
        self.edit_minutes = edit_minutes
        self._quiz = quiz
        self._clock = clock

    # ------------------------------------------------------------------------------------------------- ranking

    def next_task(self, annotator: str) -> Task | None:
        """The task in the annotator's hands, or a new one; None when nothing is left for them.

        The same task comes back, in the same order and with its draft, until it is submitted or skipped, or its lease
        has run out and others have taken its place.
        """
        with self.store.write() as connection:
            self._admit(connection, annotator)
            given = assignment.claim(connection, annotator, self.policy, self._clock())
            return None if given is None else task.show(connection, given)

    def submit(
        self,
        annotator: str,
        task_id: int,
        key: str,
        tiers: Tiers,
        aside: Sequence[int] = (),
        *,
        flags: Mapping[str, Any] | None = None,
        rationale: str | None = None,
        seconds: float | None = None,
    ) -> Receipt:
        """Save a ranking and return once it is on disk. Raises DataError, with nothing saved, where it breaks a rule.

        Every place must be in one tier or set `aside`. A task that was ranked before gets a new version, within the
        minutes in which it may be edited. What came after its place had gone to others is kept, marked as late.
        """
        now = self._clock()
        with self.store.write() as connection:
            given = assignment.find(connection, task_id, annotator, self.policy)
            judgement = self._judgement(given, tiers, aside, flags or {}, rationale, said.checked_seconds(seconds), now)
            repeated = history.acknowledged(connection, key, given.id, judgement)
            if repeated is not None:
                return Receipt(repeated, repeated=True)
            self._admit(connection, annotator)
            if not given.in_hand(now):
                self._check_editable(connection, given, now)
            late = not assignment.has_place(connection, given, self.policy, now)
            marks = [LATE] * late + [quality.TOO_FAST] * self._too_fast(connection, given, judgement.seconds)
            ranking_id = add_ranking(connection, given.id, key, judgement, marks)
            assignment.move(connection, given, LATE if late else DONE, ranking=ranking_id)
            drafts.drop(connection, given.id)
        return Receipt(ranking_id, repeated=False)

    def save_draft(self, annotator: str, task_id: int, body: dict[str, Any]) -> str:
        """Keep what the annotator has begun to say and return when it was (ISO 8601); also while they are paused.

        It renews the lease. Raises DataError for a task that is not in their hands, or a draft that is too large.
        """
        now = self._clock()
        at = iso(now)
        with self.store.write() as connection:
            given = assignment.find(connection, task_id, annotator, self.policy)
            if not given.in_hand(now):
                raise Conflict(f"task {task_id} is ranked or skipped already: no draft of it is kept")
            drafts.keep(connection, given.id, body, at)
            assignment.renew(connection, given, self.policy, now)
        return at

    def skip(self, annotator: str, task_id: int, reason: str | None = None) -> None:
        """Put a task away unranked, for others to take. It comes back only if the annotator asks for it.

        What is ranked or skipped already stays as it is; an edit of it is broken off.
        """
        why = said.checked_text("reason", reason, said.MAX_NOTE)
        with self.store.write() as connection:
            self._admit(connection, annotator)
            given = assignment.find(connection, task_id, annotator, self.policy)
            if given.state == OPEN:
                assignment.move(connection, given, SKIPPED, reason=why)
            elif given.in_hand(self._clock()):
                assignment.move(connection, given, given.state, reason=why)
                drafts.drop(connection, given.id)

    # ------------------------------------------------------------------------------------------------- second thoughts

    def last(self, annotator: str) -> int | None:
        """The task that the annotator ranked or skipped last, and that `undo` would take back."""
        with self.store.read() as connection:
            found = assignment.closed(connection, annotator, self.policy, self._clock(), limit=1)
        return found[0].id if found else None

    def undo(self, annotator: str, task_id: int | None = None) -> int | None:
        """Take back the annotator's last submit or skip and return its task's id; None when there is none.

        The task comes next; its ranking no longer counts but stays in the store. With `task_id` that task alone is
        meant: once it is back, a second time changes nothing. Raises DataError where it is not the last one, was
        submitted too long ago, or skipped and taken by others.
        """
        now = self._clock()
        with self.store.write() as connection:
            self._admit(connection, annotator)
            if task_id is not None and assignment.find(connection, task_id, annotator, self.policy).in_hand(now):
                return task_id
            for last in assignment.closed(connection, annotator, self.policy, now, limit=1):
                if task_id not in (None, last.id):
                    raise Conflict("something else was ranked or skipped after this: reload the page to see it")
                self._check_editable(connection, last, now)
                if withdraw(connection, last.id):
                    assignment.take_back(connection, last, self.policy, now)
                else:
                    assignment.reopen(connection, last, self.policy, now)
                return last.id
        return None

    def reopen(self, annotator: str, task_id: int) -> None:
        """Let a task of the annotator's come next, with what was said of it. That stands until they submit again.

        Raises DataError where it was submitted too long ago, or skipped and taken by others.
        """
        now = self._clock()
        with self.store.write() as connection:
            self._admit(connection, annotator)
            given = assignment.find(connection, task_id, annotator, self.policy)
            self._check_editable(connection, given, now)
            assignment.reopen(connection, given, self.policy, now)

    def recent(self, annotator: str, limit: int = 10) -> list[Past]:
        """What the annotator ranked and skipped last, the newest first."""
        now = self._clock()
        with self.store.read() as connection:
            found = assignment.closed(connection, annotator, self.policy, now, min(limit, 100))
            return [history.past(connection, given, self.policy, now, 60 * self.edit_minutes) for given in found]

    # ------------------------------------------------------------------------------------------------- beside the task

    def diff(self, annotator: str, task_id: int, first: int, second: int) -> list[diff.Piece]:
        """What two completions of a task, at these places on the page, have in common, by words."""
        with self.store.read() as connection:
            given = assignment.find(connection, task_id, annotator, self.policy)
            _, texts = task.read(connection, given)
        for place in (first, second):
            if type(place) is not int or not 0 <= place < len(texts):
                raise DataError(f"place {place!r} is not one of the {len(texts)} completions")
        return diff.words(texts[first], texts[second])

    def progress(self, annotator: str) -> Progress:
        """How many items of the round the annotator has ranked and skipped and could still rank, and how fast."""
        with self.store.read() as connection:
            return history.progress(connection, annotator, self.policy, self._clock())

    def wanted(self) -> int:
        """How many rankings the round still needs, whoever gives them."""
        with self.store.read() as connection:
            return places.wanted(connection, self.policy, self._clock())

    def slots(self) -> int:
        """The most completions that an item of the round, or a gold item, has."""
        with self.store.read() as connection:
            return places.most_completions(connection, self.policy)

    def onboarding(self, annotator: str) -> Onboarding:
        """Guidelines and quiz as they stand, and whether the annotator has passed."""
        with self.store.read() as connection:
            return guidelines.onboarding(connection, annotator, self.guideline_version)

    def answer_quiz(self, annotator: str, answers: Sequence[int]) -> QuizResult:
        """Answer the quiz: for each question the number of an option, from 0. All must be right; it may be repeated."""
        with self.store.write() as connection:
            return guidelines.answer_quiz(connection, annotator, self.guideline_version, answers)

    # ------------------------------------------------------------------------------------------------- rules

    def _admit(self, connection: sa.Connection, annotator: str) -> None:
        """Raises DataError for an annotator who is paused, or has not passed the quiz."""
        if connection.scalar(sa.select(users.c.paused).where(users.c.name == annotator)):
            raise NotAllowed("your work is paused: what you have begun is kept; ask whoever runs this round")
        if self._quiz and not guidelines.passed(connection, annotator, self.guideline_version):
            raise NotAllowed(f"answer the quiz on the guidelines (version {self.guideline_version}) first")

    def _judgement(
        self,
        given: Assignment,
        tiers: Tiers,
        aside: Sequence[int],
        flags: Mapping[str, Any],
        rationale: str | None,
        seconds: float | None,
        now: float,
    ) -> Judgement:
        order = given.presented_order
        checked = said.checked_flags(flags, self.criteria, order)
        return Judgement(
            ranks=said.checked_ranks(tiers, aside, order, all_aside=any(name in checked for name in said.UNRANKED)),
            presented_order=order,
            flags=checked,
            rationale=said.checked_text("rationale", rationale, said.MAX_RATIONALE),
            seconds=quality.time_taken(seconds, given.shown_at, now),
            guideline_version=self.guideline_version,
            created_at=iso(now),
        )

    def _too_fast(self, connection: sa.Connection, given: Assignment, seconds: float | None) -> bool:
        """Whether the item could not be read in the time, that of earlier versions included."""
        if self.words_per_second is None or seconds is None:
            return False
        total = seconds + history.seconds_before(connection, given.id)
        return quality.is_too_fast(total, quality.words(*task.read(connection, given)), self.words_per_second)

    def _check_editable(self, connection: sa.Connection, given: Assignment, now: float) -> None:
        saved = history.saved_at(connection, given.id)
        if saved is not None and now - saved > 60 * self.edit_minutes:
            raise Conflict(f"this was saved more than {self.edit_minutes:g} minutes ago: it can no longer be changed")

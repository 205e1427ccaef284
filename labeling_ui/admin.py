"""What admins do: see how the work goes and who does it how well, settle disputes, pause people, take the data out.

Every use case takes who asks and refuses everybody but admins, whatever let the request through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from labeling_ui import coverage, disputes
from labeling_ui.agreement import Agreement, agreement, ranked_together, tie_share, wins_by_place
from labeling_ui.annotators import AnnotatorReport, annotator_reports
from labeling_ui.auth import Accounts
from labeling_ui.concordance import Concordance, concordance, ratings_agreement
from labeling_ui.coverage import Overview
from labeling_ui.disputes import Case, Dispute, Ruling, Statement
from labeling_ui.intervals import Rate
from labeling_ui.person import Person
from labeling_ui.places import Policy
from labeling_ui.quality import gold_pairs, repeat_pairs
from labeling_ui.raters import RaterModel, SoftLabel, fit_raters
from labeling_ui.said import Tiers
from rlhf.event_log import ERASED, FORGET, head
from rlhf.judgements import ADJUDICATION
from rlhf.schema import assignments, events, rankings, users
from rlhf.store import Store
from rlhf.types import DataError, Prompt, Ranking

T = TypeVar("T")

REST = 20.0
"""Dear numbers rest this many times as long as they took, so that annotators keep the processor."""


@dataclass(frozen=True)
class Together:
    """How well all annotators agree, over the items of the round that several of them ranked."""

    rankings: int
    items: int
    annotators: int
    agreement: Agreement
    concordance: Concordance
    ratings: dict[str, Rate]
    """Gwet's coefficients of flags and criteria, by name."""
    tie_share: float | None
    wins_by_place: tuple[float | None, ...]
    """Share of comparisons won at each place on the page; 1/2 everywhere: the place does not matter."""


@dataclass(frozen=True)
class People:
    """Every annotator's numbers, and the times behind them."""

    reports: tuple[AnnotatorReport, ...]
    seconds: dict[str, tuple[float, ...]]
    """Seconds of each ranking, by annotator."""


@dataclass(frozen=True)
class Disputed:
    """An item on the list of disputes."""

    item_id: int
    prompt: Prompt
    annotators: int
    disagreement: float
    doubt: float
    adjudicated_by: str | None


class Kept(Generic[T]):
    """A value that is dear to compute, kept until what it rests on has changed, and at least `rest` times as long as it
    took. Whoever asks while it is computed waits for it."""

    def __init__(self, rest: float = REST) -> None:
        self._rest, self._lock = rest, Lock()
        self._version: object = None
        self._value: T | None = None
        self._until = 0.0

    def get(self, version: object, compute: Callable[[], T]) -> T:
        """The value for this version of the store, or one of just before it."""
        with self._lock:
            begun = time.monotonic()
            if self._value is None or (version != self._version and begun >= self._until):
                self._value, self._version = compute(), version
                ended = time.monotonic()
                self._until = ended + self._rest * (ended - begun)
            return self._value


class Admin:
    """The admins' use cases over one store; safe to call from several threads.

    Every method raises PermissionError for whoever is no admin, and DataError for what cannot be done. Without
    `accounts` nobody can be paused: there is one person. `clock` gives unix time.
    """

    def __init__(
        self,
        store: Store,
        policy: Policy,
        *,
        accounts: Accounts | None = None,
        guideline_version: int = 1,
        clock: Callable[[], float] = time.time,
        rest: float = REST,
    ) -> None:
        self.store, self.policy, self.accounts = store, policy, accounts
        self.guideline_version = guideline_version
        self._clock = clock
        self._model = Kept[RaterModel](rest)
        self._together, self._people = Kept[Together](rest), Kept[People](rest)
        self._disputes = Kept[list[Dispute]](rest)
        self._labels = Kept[Sequence[SoftLabel]](rest=0.0)

    def check(self, person: Person) -> None:
        """Raises PermissionError for whoever is no admin."""
        if person.role != "admin":
            raise PermissionError(f"{person.name!r} is not an admin")

    # ------------------------------------------------------------------------------------------------ numbers

    def overview(self, person: Person) -> Overview:
        """Queue and coverage, as they are now."""
        self.check(person)
        with self.store.read() as connection:
            return coverage.overview(connection, self.policy, self._clock())

    def together(self, person: Person) -> Together:
        """Agreement of all annotators in the round."""
        self.check(person)
        return self._together.get(self._version(), lambda: _agreed(self._rankings()))

    def people(self, person: Person) -> People:
        """Each annotator's numbers in the round."""
        self.check(person)
        return self._people.get(self._version(), self._reports)

    def paused(self, person: Person) -> dict[str, bool]:
        """Who has an account, and whether they are paused."""
        self.check(person)
        if self.accounts is None:
            return {}
        with self.store.read() as connection:
            rows = connection.execute(sa.select(users.c.name, users.c.paused).order_by(users.c.name))
            return {row.name: row.paused for row in rows}

    def labels(self, person: Person) -> Sequence[SoftLabel]:
        """What all rankings of the round together say of every two completions, by the rater model, as of now.

        Of an adjudicated item its last word alone counts, as in training.
        """
        self.check(person)
        with self.store.read() as connection:
            version = head(connection)
        return self._labels.get(version, self._labelled)

    def _labelled(self) -> Sequence[SoftLabel]:
        found = self.store.rankings(rounds=[self.policy.round], resolved=True)
        return fit_raters(found, gold=gold_pairs(self.store)).labels

    # ------------------------------------------------------------------------------------------------ disputes

    def disputed(self, person: Person, limit: int = 50) -> list[Disputed]:
        """The items of the round on which annotators differ, those that leave most doubt first."""
        self.check(person)
        found = self._disputes.get(self._version(), lambda: disputes.disputes(self._rankings(), self._fit()))
        with self.store.read() as connection:
            known = disputes.last_words(connection)
        return [
            Disputed(item_id, each.prompt, each.annotators, each.disagreement, each.doubt, adjudicated_by)
            for each in found[:limit]
            for item_id, adjudicated_by in [known[each.key]]
        ]

    def case(self, person: Person, item_id: int) -> Case:
        """One item, blind, in an order of the adjudicator's own."""
        self.check(person)
        with self.store.read() as connection:
            return disputes.case(connection, person.name, item_id, self.policy.seed)

    def reveal(self, person: Person, item_id: int) -> list[Statement]:
        """What stands on the item, by places as in `case`. That it was asked for is put on record."""
        self.check(person)
        with self.store.write() as connection:
            shown = disputes.case(connection, person.name, item_id, self.policy.seed)
            disputes.reveal(connection, person.name, item_id)
            return disputes.statements(connection, item_id, shown.order)

    def adjudicate(
        self,
        person: Person,
        item_id: int,
        key: str,
        tiers: Tiers,
        aside: Sequence[int] = (),
        *,
        flags: Mapping[str, Any] | None = None,
        rationale: str | None = None,
    ) -> Ruling:
        """Save the last word on an item, by places as in `case`, and return once it is on disk.

        The same key a second time changes nothing; another word supersedes the one before, which stays in the store.
        """
        self.check(person)
        with self.store.write() as connection:
            shown = disputes.case(connection, person.name, item_id, self.policy.seed)
            return disputes.adjudicate(
                connection,
                shown,
                person.name,
                key,
                tiers,
                aside,
                flags=flags or {},
                rationale=rationale,
                guideline_version=self.guideline_version,
                now=self._clock(),
            )

    def take_back(self, person: Person, item_id: int) -> bool:
        """Let the annotators' rankings of an item count again; returns whether there was an adjudication of it."""
        self.check(person)
        with self.store.write() as connection:
            return disputes.take_back(connection, item_id)

    # ------------------------------------------------------------------------------------------------ people

    def pause(self, person: Person, name: str, paused: bool) -> None:
        """Give this annotator no more items, or items again. Raises DataError for whoever has no account."""
        self.check(person)
        if self.accounts is None:
            raise DataError("nobody can be paused: this page has no accounts")
        change = self.accounts.pause if paused else self.accounts.resume
        change(name, by=person.name)

    # ------------------------------------------------------------------------------------------------ what they rest on

    def _version(self) -> object:
        """Changes whenever a ranking, a known answer or somebody's name does; adjudications leave the numbers alone."""
        said = sa.select(sa.func.max(rankings.c.id), sa.func.count()).join(
            assignments, rankings.c.assignment_id == assignments.c.id
        )
        others = sa.select(sa.func.max(events.c.id)).where(events.c.kind.in_([FORGET, ERASED, "gold"]))
        with self.store.read() as connection:
            standing = connection.execute(said.where(rankings.c.active, assignments.c.kind != ADJUDICATION)).one()
            return (*standing, connection.scalar(others))

    def _rankings(self) -> list[Ranking]:
        return self.store.rankings(rounds=[self.policy.round])

    def _fit(self) -> RaterModel:
        return self._model.get(self._version(), self._fitted)

    def _fitted(self) -> RaterModel:
        return fit_raters(self._rankings(), gold=gold_pairs(self.store))

    def _reports(self) -> People:
        found = self._rankings()
        repeats = repeat_pairs(self.store, rounds=[self.policy.round])
        reports = annotator_reports(found, repeats=repeats, gold=gold_pairs(self.store), model=self._fit())
        seconds: dict[str, list[float]] = {}
        for each in found:
            seconds.setdefault(each.annotator, []).extend([] if each.seconds is None else [each.seconds])
        return People(tuple(reports), {name: tuple(values) for name, values in seconds.items()})


def _agreed(found: Sequence[Ranking]) -> Together:
    shared = ranked_together(found)
    return Together(
        rankings=len(found),
        items=len(shared),
        annotators=len({each.annotator for each in found}),
        agreement=agreement(found),
        concordance=concordance(found),
        ratings=ratings_agreement(found),
        tie_share=tie_share(found),
        wins_by_place=tuple(wins_by_place(found)),
    )

"""Any sequence of what annotators do, held against a model that fits on a page and lives in memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService, Task
from rlhf.schema import assignments, rankings
from rlhf.store import Store
from rlhf.types import DataError
from tests.labeling_ui.rankers import fill

ITEMS, OVERLAP, LEASE, EDIT = 4, 2, 100.0, 500.0
WHO = st.sampled_from(["ann", "bob", "cem"])


class Service(RuleBasedStateMachine):
    """The model: for each (annotator, task) the item, the standing ranking with its time, and who holds a place."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "labels.db")
        fill(self.store, ITEMS)
        self.now = 1e9
        policy = Policy(overlap=OVERLAP, lease_seconds=LEASE)
        self.service = LabelService(self.store, policy, clock=lambda: self.now, edit_minutes=EDIT / 60)
        self.item: dict[int, str] = {}
        self.owner: dict[int, str] = {}
        self.lease: dict[int, float] = {}
        self.said: dict[int, tuple[bool, float]] = {}  # whether the first on the page won, and when
        self.late: set[int] = set()
        self.skipped: set[int] = set()
        self.tabs: list[tuple[str, Task]] = []
        self.acknowledged: dict[str, int] = {}
        self.drafts: dict[int, int] = {}

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def holders(self, item: str, besides: int | None = None) -> int:
        """Places of an item that are taken."""
        return sum(self.holds(task) for task, of in self.item.items() if of == item and task != besides)

    def holds(self, task: int) -> bool:
        if task in self.late or task in self.skipped:
            return False
        return task in self.said or self.lease[task] > self.now

    def in_hand(self, task: int) -> bool:
        unranked = task not in self.said and task not in self.skipped
        return unranked or self.lease[task] > self.now

    @rule(who=WHO)
    def asks(self, who: str) -> None:
        task = self.service.next_task(who)
        mine = [each for each, owner in self.owner.items() if owner == who]
        had = {self.item[each] for each in mine}
        free = [f"{n}" for n in range(1, ITEMS + 1) if self.holders(str(n)) < OVERLAP and str(n) not in had]
        kept = [
            t for t in mine if self.in_hand(t) and (self.lease[t] > self.now or self.holders(self.item[t]) < OVERLAP)
        ]
        if task is None:
            assert not kept
            assert not free
            return
        item = task.completions[0].split()[0]
        if task.id in self.owner:
            assert task.id in kept
            assert task.draft == ({"n": self.drafts[task.id]} if task.id in self.drafts else None)
        else:
            assert not kept
            assert item in free
            self.owner[task.id], self.item[task.id] = who, item
        self.lease[task.id] = self.now + LEASE
        self.tabs.append((who, task))

    @rule(data=st.data(), first=st.booleans())
    def submits(self, data: st.DataObject, first: bool) -> None:
        if not self.tabs:
            return
        who, task = data.draw(st.sampled_from(self.tabs))
        tiers = [[0], [1]] if first else [[1], [0]]
        known = self.acknowledged.get(task.key)
        saved = self.said.get(task.id)
        too_old = saved is not None and not self.in_hand(task.id) and self.now - saved[1] > EDIT
        try:
            receipt = self.service.submit(who, task.id, task.key, tiers)
        except DataError:
            assert known is not None or too_old
            return
        if known is not None:
            assert (receipt.ranking_id, receipt.repeated) == (known, True)
            return
        assert not too_old
        assert not receipt.repeated
        counts = task.id in self.said and task.id not in self.late
        fits = self.holders(self.item[task.id], besides=task.id) < OVERLAP
        self.late = self.late - {task.id} if counts or fits else self.late | {task.id}
        self.said[task.id], self.lease[task.id] = (first, self.now), 0.0
        self.skipped.discard(task.id)
        self.drafts.pop(task.id, None)
        self.acknowledged[task.key] = receipt.ranking_id

    @rule(data=st.data())
    def skips(self, data: st.DataObject) -> None:
        if not self.tabs:
            return
        who, task = data.draw(st.sampled_from(self.tabs))
        self.service.skip(who, task.id)
        if task.id in self.said or task.id in self.skipped:
            if self.lease[task.id] > self.now:
                self.drafts.pop(task.id, None)
        else:
            self.skipped.add(task.id)
        self.lease[task.id] = 0.0 if self.in_hand(task.id) else self.lease[task.id]
        if task.id in self.skipped:
            self.lease[task.id] = 0.0

    @rule(who=WHO)
    def undoes(self, who: str) -> None:
        mine = [each for each, owner in self.owner.items() if owner == who]
        closed = {each for each in mine if not self.in_hand(each)}
        try:
            task = self.service.undo(who)
        except DataError:
            assert closed
            return
        assert (task is None) == (not closed)
        if task is None:
            return
        assert task in closed
        if task in self.said:
            assert self.now - self.said.pop(task)[1] <= EDIT
            self.skipped = self.skipped | {task} if task in self.late else self.skipped
            self.late.discard(task)
        else:
            assert self.holders(self.item[task], besides=task) < OVERLAP
            self.skipped.discard(task)
        self.lease[task] = self.now + LEASE

    @rule(data=st.data(), number=st.integers(0, 9))
    def drafts_something(self, data: st.DataObject, number: int) -> None:
        if not self.tabs:
            return
        who, task = data.draw(st.sampled_from(self.tabs))
        try:
            self.service.save_draft(who, task.id, {"n": number})
        except DataError:
            assert not self.in_hand(task.id)
            return
        assert self.in_hand(task.id)
        self.drafts[task.id] = number
        if self.lease[task.id] > self.now or self.holders(self.item[task.id], besides=task.id) < OVERLAP:
            self.lease[task.id] = self.now + LEASE

    @rule(seconds=st.sampled_from([1.0, 60.0, 101.0, 501.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_store_says_the_same(self) -> None:
        with self.store.read() as connection:
            rows = connection.execute(
                sa.select(assignments.c.id, assignments.c.item_id, rankings.c.marks)
                .join(rankings, rankings.c.assignment_id == assignments.c.id)
                .where(rankings.c.active)
            ).all()
        assert {row.id for row in rows} == set(self.said)
        assert {row.id for row in rows if "late" in row.marks} == self.late
        counted = Counter(row.item_id for row in rows if "late" not in row.marks)
        assert max(counted.values(), default=0) <= OVERLAP
        assert len(self.store.rankings()) == len(self.said) - len(self.late)
        assert all(self.holders(str(n)) <= OVERLAP for n in range(1, ITEMS + 1))
        wanted = sum(OVERLAP - self.holders(str(n)) for n in range(1, ITEMS + 1))
        assert self.service.wanted() == wanted


TestService = Service.TestCase
TestService.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)

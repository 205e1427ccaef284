"""Annotators for tests of many at once: they rank, skip, undo, edit, dawdle and come too late. Usable as a process.

`python -m tests.labeling_ui.rankers STORE OVERLAP SEED NAME...` prints the ids of all rankings that were acknowledged.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy as sa

from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService, Task
from rlhf.schema import assignments, completions, items, rankings
from rlhf.store import Store
from rlhf.types import DataError

T = TypeVar("T")


class Ticks:
    """Time that goes on by one second whenever somebody looks."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            self._now += 1
            return self._now


class Ranker:
    """One annotator with habits, drawn with a seed."""

    def __init__(self, service: LabelService, name: str, seed: int, *, tidy: bool = False) -> None:
        self.service, self.name = service, name
        self.chance = random.Random(f"{seed} {name}")
        self.tidy = tidy
        self.acknowledged: list[int] = []
        self._put_off: list[Task] = []

    def work(self) -> None:
        """Until nothing is left."""
        while (task := patiently(lambda: self.service.next_task(self.name))) is not None:
            self._turn(task)
            if len(self._put_off) > 3:
                self._submit(self._put_off.pop(0))
        for task in self._put_off:
            self._submit(task)

    def _turn(self, task: Task) -> None:
        habit = 1.0 if self.tidy else self.chance.random()
        if habit < 0.06:
            patiently(lambda: self.service.skip(self.name, task.id))
        elif habit < 0.12:
            self._submit(task)
            patiently(lambda: self.service.undo(self.name))
        elif habit < 0.18:
            self._submit(task)
            patiently(lambda: self.service.reopen(self.name, task.id))
        elif habit < 0.24:  # walks away, and submits from an old tab
            self._put_off.append(task)
            for _ in range(70):
                self.service._clock()  # time goes on
        else:
            self._submit(task)

    def _submit(self, task: Task) -> None:
        places = list(range(len(task.completions)))
        self.chance.shuffle(places)
        tiers = [[place] for place in places]
        receipt = patiently(lambda: self.service.submit(self.name, task.id, task.key, tiers))
        if self.chance.random() < 0.2:  # a double click
            assert patiently(lambda: self.service.submit(self.name, task.id, task.key, tiers)).repeated
        self.acknowledged.append(receipt.ranking_id)


def patiently(call: Callable[[], T]) -> T:
    """Again and again while the store is busy, as the page does: on a crowded machine a thread may wait for long."""
    for _ in range(20):
        try:
            return call()
        except DataError as error:
            if "busy" not in str(error):
                raise
    return call()


def fill(store: Store, count: int) -> None:
    """Items with two completions."""
    with store.write() as connection:
        numbers = range(1, count + 1)
        row = {"prompt": "p", "round": 0}
        connection.execute(sa.insert(items), [{"key": str(n), "prompt_key": str(n), **row} for n in numbers])
        ids = connection.scalars(sa.select(items.c.id)).all()
        text = {"model": "m", "seed": 0, "settings": {}, "finished": True}
        rows = [{"item_id": n, "position": p, "text": f"{n} {p}", **text} for n in ids for p in range(2)]
        connection.execute(sa.insert(completions), rows)


def problems(store: Store, overlap: int, acknowledged: Sequence[int]) -> list[str]:
    """What is wrong with a store in which everybody has finished."""
    with store.read() as connection:
        said = connection.execute(
            sa.select(rankings, assignments.c.item_id, assignments.c.annotator, assignments.c.state).join(assignments)
        ).all()
        known = connection.scalars(sa.select(items.c.id)).all()
    standing = [row for row in said if row.active]
    counted = Counter(row.item_id for row in standing if "late" not in row.marks)
    found = [f"item {each} has {counted[each]} rankings that count" for each in known if counted[each] != overlap]
    twice = Counter((row.item_id, row.annotator) for row in standing)
    found += [f"{who} has {count} rankings of item {item}" for (item, who), count in twice.items() if count > 1]
    found += [f"ranking {n} was acknowledged and is gone" for n in set(acknowledged) - {row.id for row in said}]
    found += [
        f"ranking {row.id} is {row.marks} in state {row.state}"
        for row in standing
        if ("late" in row.marks) != (row.state == "late")
    ]
    found += [] if len(set(acknowledged)) == len(acknowledged) else ["a ranking was acknowledged twice"]
    trained = Counter(ranking.completions for ranking in store.rankings())
    return found + [f"{texts} trains {count} times" for texts, count in trained.items() if count != overlap]


def main(arguments: Sequence[str]) -> None:
    url, overlap, seed, *names = arguments
    store = Store(url, create=False)
    service = LabelService(store, Policy(overlap=int(overlap), lease_seconds=0.3))
    people = [Ranker(service, name, int(seed)) for name in names]
    together(people)
    print(json.dumps([each for person in people for each in person.acknowledged]))
    store.close()


def together(people: Sequence[Ranker], threads: int = 16) -> None:
    """Let everybody work, so many at a time. Raises what one of them raised."""
    waiting, failures = list(people), []

    def go_on() -> None:
        try:
            while True:
                try:
                    person = waiting.pop(0)
                except IndexError:
                    return
                person.work()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=go_on) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    main(sys.argv[1:])

"""A label store as it is after a week's work of five people, one of whom clicks at random, and the page over it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from argon2 import PasswordHasher

from labeling_ui import app
from labeling_ui.admin import Admin
from labeling_ui.auth import Accounts
from labeling_ui.hidden import GOLD_ROUND
from labeling_ui.history import iso
from labeling_ui.passwords import Hashes
from labeling_ui.places import Policy
from labeling_ui.said import checked_ranks
from labeling_ui.service import LabelService
from labeling_ui.simulate import Annotator
from labeling_ui.task import Task
from rlhf.config import LabelConfig
from rlhf.event_log import add_event
from rlhf.judgements import GOLD, LATE, REPEAT, TASK, Judgement, add_ranking, insert
from rlhf.schema import assignments, gold
from rlhf.store import Item, Store
from rlhf.types import Completion
from tests.e2e.serving import serving

PASSWORD = "correct horse battery"
DAY = 86400.0
PEOPLE = (
    Annotator("ada", temperature=0.35, position_bias=0.0, tie_threshold=0.15, seed=1),
    Annotator("béla", temperature=0.6, position_bias=0.1, tie_threshold=0.15, seed=2),
    Annotator("chen", temperature=0.7, position_bias=0.0, tie_threshold=0.3, seed=3),
    Annotator("dara", temperature=0.6, position_bias=1.6, tie_threshold=0.1, seed=4),
    Annotator("emil", temperature=60.0, position_bias=0.0, tie_threshold=0.0, seed=5),
)
"""Who works here: dara prefers what stands first, emil clicks at random, and fast."""
HASTE = {"emil": 4.0}
"""Median seconds of an item; 38 for the others."""
UNFINISHED = (("open", 900), ("open", -60), ("skipped", 0), (LATE, 0), ("open", 300))
"""States of the last assignments, and seconds that their leases still run."""
PLACES = ("the harbour", "the old mill", "a night train", "the lighthouse", "the market", "a mountain hut")
ASKS = ("Describe {} in one paragraph.", "Write a letter home from {}.", "What would a child notice at {}?")
SENTENCES = (
    "The lamp is lit an hour before dusk and trimmed twice before midnight.",
    "Nobody hurries here, and yet everything is done by six.",
    "You can smell the tar and the oranges before you see the boats.",
    "It is loud, then quiet, then loud again when the wind turns.",
    "There is a bench that everybody calls theirs.",
    "I counted eleven gulls, one dog and no clocks.",
)


@dataclass
class World:
    """A running page over a store that has been worked on. `utility` by item id and position."""

    url: str
    store: Store
    service: LabelService
    admin: Admin


def fill(store: Store, items: int, overlap: int, now: float, seed: int = 0, hidden: int = 12) -> Policy:
    """Items and what `PEOPLE` said of three quarters of them in the last five days; then some of it is hidden items."""
    chance = random.Random(seed)
    policy = Policy(overlap=overlap, seed=seed)
    for number in range(items + hidden):
        prompt = ASKS[number % 3].format(PLACES[number % 6]) + f" ({number + 1})"
        texts = [" ".join(chance.sample(SENTENCES, chance.randint(1, 4))) + " " * n for n in range(4)]
        where = GOLD_ROUND if number >= items else 0
        store.add_completions(prompt, [Completion(text, "m", n) for n, text in enumerate(texts)], round=where)
    utility = {each.id: [chance.gauss(0, 1) for _ in each.completions] for each in store.items()}
    with store.write() as connection:
        _rank_all(connection, store_items(store, 0), policy, utility, chance, now)
        _answer_gold(connection, store_items(store, GOLD_ROUND), utility, chance, now)
    return policy


def store_items(store: Store, round: int) -> list[Item]:
    return store.items(round)


def _rank_all(
    connection: sa.Connection,
    found: Sequence[Item],
    policy: Policy,
    utility: dict[int, list[float]],
    chance: random.Random,
    now: float,
) -> None:
    """Tasks in turn, a quarter left over, and some of them once more; a few late, skipped and in hand."""
    done = found[: len(found) * 3 // 4]
    for number, item in enumerate(done):
        at = now - 5 * DAY + 4.9 * DAY * (number / len(done))
        for each in chance.sample(PEOPLE, policy.wanted(item.id)):
            say(connection, item, each, TASK, utility, chance, at)
    for item in done[:20]:
        say_again(connection, item, utility, chance, now)
    free = found[len(done) :]
    for item, each in zip(free, PEOPLE, strict=False):
        say(connection, item, each, TASK, utility, chance, now - 400)
    for item, each, (state, until) in zip(free[5:], PEOPLE, UNFINISHED, strict=False):
        say(connection, item, each, TASK, utility, chance, now - 200, state=state, until=now + until)


def say(
    connection: sa.Connection,
    item: Item,
    each: Annotator,
    kind: str,
    utility: dict[int, list[float]],
    chance: random.Random,
    at: float,
    *,
    state: str = "done",
    until: float = 0.0,
) -> int:
    """One assignment, and the ranking of it if its state says so."""
    order = list(range(len(item.completions)))
    chance.shuffle(order)
    row = {"item_id": item.id, "annotator": each.name, "kind": kind, "presented_order": order, "state": state}
    event = add_event(connection, "assigned", each.name, item.id)
    given = insert(connection, assignments, {**row, "leased_until": until, "shown_at": at - 60, "event": event})
    if state not in ("done", LATE):
        return given
    again = each if kind == TASK else replace(each, seed=each.seed + 100)
    texts = tuple(item.completions[index].text for index in order)
    tiers = again.rank(Task(given, item.prompt, texts, "key"), [utility[item.id][index] for index in order])
    said = Judgement(
        ranks=checked_ranks(tiers, (), order),
        presented_order=tuple(order),
        flags=_flags(chance) if kind == TASK else {},
        seconds=round(HASTE.get(each.name, 38.0) * chance.lognormvariate(0, 0.5), 1),
        created_at=iso(at),
    )
    marks = [LATE] * (state == LATE) + ["too_fast"] * (each.name in HASTE and chance.random() < 0.7)
    add_ranking(connection, given, f"{item.id}-{each.name}-{kind}", said, marks)
    return given


def say_again(
    connection: sa.Connection, item: Item, utility: dict[int, list[float]], chance: random.Random, now: float
) -> None:
    """Whoever ranked it ranks it once more."""
    ranked = sa.select(assignments.c.annotator).where(assignments.c.item_id == item.id, assignments.c.kind == TASK)
    for name in list(connection.scalars(ranked)):
        each = next(each for each in PEOPLE if each.name == name)
        say(connection, item, each, REPEAT, utility, chance, now - DAY)


def _answer_gold(
    connection: sa.Connection, found: Sequence[Item], utility: dict[int, list[float]], chance: random.Random, now: float
) -> None:
    for item in found:
        values = utility[item.id]
        ranks = [1 + sum(other > value for other in values) for value in values]
        connection.execute(sa.insert(gold).values(item_id=item.id, ranks=ranks, explanation=None))
        for each in PEOPLE:
            say(connection, item, each, GOLD, utility, chance, now - 2 * DAY)


def _flags(chance: random.Random) -> dict[str, Any]:
    drawn = chance.random()
    if drawn < 0.015:
        return {"unsafe": True, "note": "The second paragraph names a real person."}
    return {"unclear": True} if drawn < 0.04 else {}


@contextmanager
def running(folder: Path, *, items: int = 200, overlap: int = 3, accounts: bool = True) -> Iterator[World]:
    """Serve the page over a new store; with accounts for `PEOPLE` and an admin, `root`, all with `PASSWORD`."""
    store = Store(folder / "labels.db")
    policy = fill(store, items, overlap, time.time())
    service = LabelService(store, policy)
    people = Accounts(store, hashes=Hashes(PasswordHasher(1, 8, 1))) if accounts else None
    if people is not None:
        people.join(people.invite("admin", "root"), "root", PASSWORD)
        for each in PEOPLE:
            people.join(people.invite("annotator", each.name), each.name, PASSWORD)
    admin = Admin(store, policy, accounts=people, rest=0.0)
    config = LabelConfig(store=store.name, annotator="me", accounts=accounts)
    served = app.create(service, config, people, slots=4, admin=admin)
    with serving(served) as url:
        yield World(url, store, service, admin)
    store.close()

"""Gold items and repeats: as often as was asked for, never twice, and nothing an annotator sees tells them apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa

from labeling_ui import quality
from labeling_ui.assignment import Policy
from labeling_ui.hidden import REPEAT_AFTER, Plan, Shown, upcoming
from labeling_ui.service import LabelService, Task
from rlhf.data import write_rankings
from rlhf.judgements import GOLD, REPEAT, TASK
from rlhf.schema import assignments
from rlhf.store import Store
from rlhf.types import Completion, DataError, Ranking


def golden(number: int) -> Ranking:
    return Ranking(f"gold {number}", ("right", "fair", "wrong"), (1, 2, 3), "expert", rationale="right is right")


@pytest.fixture
def service(tmp_path: Path) -> LabelService:
    """40 items and 6 gold ones; a fifth of what annotators see is gold, a fifth repeated."""
    store = Store(tmp_path / "labels.db")
    for number in range(40):
        store.add_completions(f"prompt {number}", [Completion(f"text {number} {i}", "m", i) for i in range(3)])
    write_rankings(tmp_path / "gold.jsonl", [golden(number) for number in range(6)])
    quality.import_gold(store, tmp_path / "gold.jsonl")
    return LabelService(store, Policy(overlap=5, gold_rate=0.2, repeat_rate=0.2))


def rank(service: LabelService, who: str, *, careless: bool = False) -> list[Task]:
    """Rank until nothing is left, alphabetically or as shown; gold's answer is `right`, `fair`, `wrong`."""
    done = []
    while (task := service.next_task(who)) is not None:
        places = sorted(range(3), key=lambda place: 0 if careless else task.completions[place])
        service.submit(who, task.id, task.key, [[place] for place in places])
        done.append(task)
    return done


def kinds(service: LabelService, who: str) -> list[str]:
    rows = sa.select(assignments.c.kind).where(assignments.c.annotator == who).order_by(assignments.c.id)
    with service.store.read() as connection:
        return list(connection.scalars(rows))


@pytest.mark.parametrize(("gold", "repeat"), [(0.1, 0.0), (0.0, 0.07), (0.05, 0.1), (0.25, 0.25), (1 / 3, 0.01)])
def test_a_plan_keeps_to_its_rates(gold: float, repeat: float) -> None:
    for seed in range(5):
        planned = [Plan("a", gold, repeat, seed).kind(position) for position in range(3000)]
        for length in (1, 10, 99, 1000, 3000):
            counts = Counter(planned[:length])
            assert counts[GOLD] + counts[REPEAT] <= (gold + repeat) * length + 1
            assert counts[GOLD] == pytest.approx(gold * length, abs=2)
            assert counts[REPEAT] == pytest.approx(repeat * length, abs=2)


def test_when_they_come_cannot_be_counted_out() -> None:
    def gaps(annotator: str) -> list[int]:
        at = [position for position in range(2000) if Plan(annotator, 0.1).kind(position) == GOLD]
        return [later - earlier for earlier, later in pairwise(at)]

    assert len(set(gaps("a"))) > 10
    assert gaps("a") != gaps("b")
    assert gaps("a") == gaps("a")


def test_hidden_from_and_kind_say_the_same() -> None:
    plan = Plan("a", 0.13, 0.08, 3)
    found = plan.hidden_from(17)
    expected = [(position, plan.kind(position)) for position in range(17, 300) if plan.kind(position) != TASK]
    assert [next(found) for _ in expected] == expected


def brute_force(plan: Plan, shown: list[Shown], tasks: int, gold_left: int) -> int:
    """Position by position, as the definition has it."""
    done = [each.repeatable for each in shown]
    repeats, position = sum(each.kind == REPEAT for each in shown), len(shown)
    while tasks:
        kind = plan.kind(position)
        if kind == GOLD and gold_left:
            gold_left -= 1
        elif kind == REPEAT and sum(done[: max(position - REPEAT_AFTER + 1, 0)]) > repeats:
            repeats += 1
        else:
            kind, tasks = TASK, tasks - 1
        done.append(kind == TASK)
        position += 1
    return position - len(shown)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_left_is_counted_as_it_will_come(seed: int) -> None:
    plan = Plan("a", 0.15, 0.2, seed)
    shown = [
        Shown(kind, "skipped" if n % 7 == 3 else "done")
        for n, kind in enumerate([TASK] * 9 + [GOLD, REPEAT] + [TASK] * seed)
    ]
    for tasks in (0, 1, 2, 15, 80):
        for gold_left in (0, 3, 100):
            assert upcoming(plan, shown, tasks, gold_left) == brute_force(plan, shown, tasks, gold_left)
            assert upcoming(plan, [], tasks, gold_left) == brute_force(plan, [], tasks, gold_left)


def test_an_annotator_gets_every_item_once_with_hidden_ones_between(service: LabelService) -> None:
    tasks = rank(service, "a")
    given = kinds(service, "a")
    assert Counter(given)[TASK] == 40
    assert Counter(given)[GOLD] == 6, "all there are"
    assert Counter(given)[REPEAT] >= 8
    first: dict[str, tuple[int, Task]] = {}
    for position, (task, kind) in enumerate(zip(tasks, given, strict=True)):
        if kind != REPEAT:
            assert str(task.prompt) not in first, "an item never comes twice but as a repeat"
            first[str(task.prompt)] = (position, task)
            continue
        before, original = first[str(task.prompt)]
        assert position - before >= REPEAT_AFTER
        assert task.completions != original.completions, "another order"
        assert sorted(task.completions) == sorted(original.completions)
        assert task.before is None
    assert len({task.id for task in tasks}) == len(tasks)


def test_the_numbers_shown_do_not_tell_what_was_hidden(service: LabelService) -> None:
    left = [service.progress("a").remaining]
    while (task := service.next_task("a")) is not None:
        assert service.progress("a").remaining == left[-1], "in hand"
        service.submit("a", task.id, task.key, [[0], [1], [2]])
        left.append(service.progress("a").remaining)
    assert left == list(range(len(left) - 1, -1, -1))
    assert service.progress("a").ranked == len(left) - 1 > 40


def test_nothing_in_a_task_tells_its_kind(service: LabelService) -> None:
    of_ones_own = {"before", "said_at", "draft"}
    assert {field.name for field in fields(Task)} == {"id", "prompt", "completions", "key", *of_ones_own}
    tasks = rank(service, "a")
    assert [task.id for task in tasks] == sorted(task.id for task in tasks), "numbers rise, whatever comes"
    assert len({len(task.key) for task in tasks}) == 1
    assert {past.state for past in service.recent("a", 100)} == {"ranked"}


def test_hidden_ones_count_for_nothing_else(service: LabelService) -> None:
    before = service.wanted()
    rank(service, "a")
    assert service.wanted() == before - 40
    trained = service.store.rankings()
    assert len(trained) == 40
    assert not any(str(each.prompt).startswith("gold") for each in trained)
    assert service.store.counts().annotators == {"a": 40}


def test_gold_and_repeats_can_be_undone_like_any_other(service: LabelService) -> None:
    rank(service, "a")
    seen = set()
    for _ in range(30):
        assert service.undo("a") is not None
        task = service.next_task("a")
        assert task is not None
        assert task.before is not None
        service.submit("a", task.id, task.key, [[0, 1, 2]])
        seen.add(task.id)
    assert len(seen) == 1, "what was ranked again is the last one"


def test_how_well_gold_was_answered_and_what_was_said_twice(service: LabelService) -> None:
    rank(service, "careful")
    found = quality.alike(quality.gold_pairs(service.store))
    assert (found.comparisons, found.items) == (18, 6)
    assert found.share == pytest.approx(2 / 3), "by the alphabet fair comes before right: one pair of three is wrong"
    again = quality.alike(quality.repeat_pairs(service.store))
    assert again.share == 1.0
    assert again.comparisons == 3 * kinds(service, "careful").count(REPEAT)
    rank(service, "careless", careless=True)
    pairs = [pair for pair in quality.repeat_pairs(service.store) if pair[0].annotator == "careless"]
    assert quality.alike(pairs).share < 1, "who goes by places says something else each time"


def test_how_alike_two_rankings_are() -> None:
    texts = ("a", "b", "c")
    one, other = (Ranking("p", texts, ranks, "x") for ranks in ((1, 2, 2), (1, 3, 2)))
    assert quality.alike([(one, other)]) == quality.Alike((1 + 1 + 0.5) / 3, 3, 1)
    assert quality.alike([(one, Ranking("p", texts, (None, 1, 2), "x"))]) == quality.Alike(0.5, 1, 1)
    assert quality.alike([]) == quality.Alike(None, 0, 0)


def test_gold_files_are_checked(tmp_path: Path) -> None:
    store, path = Store(tmp_path / "labels.db"), tmp_path / "gold.jsonl"
    write_rankings(path, [golden(1), golden(2)])
    assert [quality.import_gold(store, path) for _ in range(2)] == [2, 2]
    assert store.items(0) == [], "gold items belong to no round"
    write_rankings(path, [Ranking("gold 1", ("right", "fair", "wrong"), (2, 1, 3), "expert")])
    assert quality.import_gold(store, path) == 1, "a corrected answer"
    write_rankings(path, [golden(1), Ranking("gold 1", ("right", "fair", "wrong"), (3, 2, 1), "other")])
    with pytest.raises(DataError, match="'gold 1' is there twice, with different answers"):
        quality.import_gold(store, path)
    write_rankings(path, [Ranking("p", ("x", "y"), (1, 1), "e")])
    with pytest.raises(DataError, match="puts nothing above anything"):
        quality.import_gold(store, path)
    path.write_text('{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "annotator": "e"}\n{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"gold.jsonl:2: there is no 'completions'"):
        quality.import_gold(store, path)

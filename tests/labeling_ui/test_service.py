"""Tasks and submits: who gets what, in which order, and what is kept of what they say."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService, Progress, Said, Task
from rlhf import schema
from rlhf.store import Store
from rlhf.types import Completion, DataError, Ranking
from tests.labeling_ui.clock import Clock

Make = Callable[..., LabelService]
NUMBERS = count()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(items: int = 3, completions: int = 4, clock: Clock | None = None, **policy: object) -> LabelService:
        store = Store(tmp_path / "labels.db")
        for number in range(items):
            texts = [Completion(f"text {number}.{place}", "secret-model", place) for place in range(completions)]
            store.add_completions(f"prompt {number}", texts)
        return LabelService(store, Policy(**policy), guideline_version=3, clock=clock or Clock())  # pyright: ignore

    return build


@pytest.fixture
def open_to_all(make: Make) -> LabelService:
    return make(items=1, overlap=1000)


def given_task(service: LabelService, annotator: str = "me") -> Task:
    task = service.next_task(annotator)
    assert task is not None
    return task


def in_order(task: Task) -> list[list[int]]:
    """Tiers that rank the places as the page shows them."""
    return [[place] for place in range(len(task.completions))]


def submit(service: LabelService, annotator: str = "me") -> Task:
    task = given_task(service, annotator)
    service.submit(annotator, task.id, task.key, in_order(task))
    return task


def only(service: LabelService) -> Ranking:
    (ranking,) = service.store.rankings()
    return ranking


def test_ranks_are_those_of_the_completions_not_of_the_places(make: Make) -> None:
    clock = Clock()
    service = make(items=1, clock=clock)
    task = given_task(service)
    clock.now += 5
    service.submit("me", task.id, task.key, [[2], [0, 3]], [1], flags={"unsafe": True}, rationale=" why ", seconds=2.5)
    saved = only(service)
    expected = {task.completions[2]: 1, task.completions[0]: 2, task.completions[3]: 2, task.completions[1]: None}
    assert dict(zip(saved.completions, saved.ranks, strict=True)) == expected
    assert [saved.completions[index] for index in saved.presented_order or ()] == list(task.completions)
    assert (saved.flags, saved.rationale, saved.seconds, saved.annotator) == ({"unsafe": True}, "why", 2.5, "me")
    assert (saved.guideline_version, saved.round) == (3, 0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(lambda ranks: ranks.count(0) <= 2))
def test_any_order_with_ties_survives_the_page(open_to_all: LabelService, ranks: list[int]) -> None:
    """`ranks` by place, 0 is set aside; the saved ranking must order the same texts in the same way."""
    who = f"annotator {next(NUMBERS)}"
    task = given_task(open_to_all, who)
    tiers = [[place for place in range(4) if ranks[place] == rank] for rank in range(1, 5)]
    open_to_all.submit(who, task.id, task.key, tiers, [place for place in range(4) if ranks[place] == 0])
    (saved,) = open_to_all.store.rankings([who])
    by_text = dict(zip(saved.completions, saved.ranks, strict=True))
    shown = [by_text[text] for text in task.completions]
    for i in range(4):
        assert (shown[i] is None) == (ranks[i] == 0)
        for j in range(4):
            if ranks[i] and ranks[j]:
                assert (shown[i] < shown[j]) == (ranks[i] < ranks[j])  # pyright: ignore


def test_a_task_hides_where_the_texts_come_from(make: Make) -> None:
    assert "secret-model" not in repr(given_task(make()))


def test_the_task_in_hand_comes_back_in_the_same_order_under_a_new_key(make: Make) -> None:
    service = make()
    first, again = given_task(service), given_task(service)
    assert (first.id, first.prompt, first.completions) == (again.id, again.prompt, again.completions)
    assert first.key != again.key


def test_orders_are_seeded_and_differ_between_annotators(tmp_path: Path, make: Make) -> None:
    service = make(items=16, overlap=4)
    other = LabelService(service.store, Policy(overlap=4, seed=1))
    orders = {}
    for who, using in (("a", service), ("b", service), ("c", other)):
        for _ in range(16):
            task = submit(using, who)
            orders[who, task.prompt] = task.completions
    again = LabelService(Store(tmp_path / "labels.db"), Policy(overlap=4))
    with again.store.read() as connection:
        stored = connection.execute(sa.select(schema.assignments.c.presented_order)).scalars().all()
    assert len(Counter(map(str, stored))) > 12, "24 orders are possible, and 48 were drawn"
    assert any(orders["a", f"prompt {n}"] != orders["b", f"prompt {n}"] for n in range(16))
    firsts = Counter(order[0] for order in stored)
    assert set(firsts) == {0, 1, 2, 3}, "no completion is always or never first"


def test_the_order_does_not_depend_on_when_one_asks(tmp_path: Path) -> None:
    seen = []
    for name, others in (("1", 0), ("2", 2)):
        store = Store(tmp_path / f"{name}.db")
        for number in range(5):
            store.add_completions(f"p{number}", [Completion(str(n), "m", n) for n in range(5)])
        service = LabelService(store, Policy(overlap=5, seed=7))
        for number in range(others):
            submit(service, f"other {number}")
        seen.append([submit(service, "me") for _ in range(5)])
    assert [(t.prompt, t.completions) for t in seen[0]] == [(t.prompt, t.completions) for t in seen[1]]


def test_the_same_key_twice_is_one_ranking(make: Make) -> None:
    service = make()
    task = given_task(service)
    first = service.submit("me", task.id, task.key, in_order(task), seconds=1)
    second = service.submit("me", task.id, task.key, in_order(task), seconds=2)
    assert (first.repeated, second.repeated) == (False, True)
    assert first.ranking_id == second.ranking_id
    assert service.store.counts().rankings == 1
    with pytest.raises(DataError, match="already saved another ranking"):
        service.submit("me", task.id, task.key, in_order(task)[::-1])


def test_many_clicks_at_once_are_one_ranking(make: Make) -> None:
    service = make()
    task = given_task(service)
    receipts = []

    def click() -> None:
        receipts.append(service.submit("me", task.id, task.key, in_order(task)))

    threads = [threading.Thread(target=click) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(receipt.repeated for receipt in receipts) == [False] + [True] * 7
    with service.store.read() as connection:
        assert connection.scalars(sa.select(sa.func.count()).select_from(schema.rankings)).one() == 1


def test_a_second_tab_gives_a_new_version(make: Make) -> None:
    service = make()
    one, other = given_task(service), given_task(service)
    service.submit("me", one.id, one.key, in_order(one))
    service.submit("me", other.id, other.key, in_order(other)[::-1])
    assert only(service).ranks != ()
    assert service.store.counts().rankings == 1
    by_text = dict(zip(only(service).completions, only(service).ranks, strict=True))
    assert by_text[other.completions[-1]] == 1


@pytest.mark.parametrize(
    ("tiers", "aside", "problem"),
    [
        ([[0], [1], [2]], [], "rank each completion once, or set it aside"),
        ([[0], [1], [2], [2, 3]], [], "rank each completion once"),
        ([[0], [1], [2], [3]], [3], "rank each completion once"),
        ([[0], [1], [2], [4]], [], "are not those of 4"),
        ([[0], [1], [2], [-1]], [], "are not those of 4"),
        ([[0], [1], [2], [True]], [], "are not those of 4"),
        ([[0]], [1, 2, 3], "at least two completions"),
        ([], [0, 1, 2, 3], "at least two completions"),
    ],
)
def test_the_server_refuses_what_the_page_should_not_send(
    make: Make, tiers: list[list[int]], aside: list[int], problem: str
) -> None:
    service = make()
    task = given_task(service)
    with pytest.raises(DataError, match=problem):
        service.submit("me", task.id, task.key, tiers, aside)
    assert service.store.counts().rankings == 0
    assert given_task(service).id == task.id


def test_other_things_that_are_refused(make: Make) -> None:
    service = make()
    task = given_task(service)
    good = in_order(task)
    for problem, call in {
        "not given to 'you'": lambda: service.submit("you", task.id, "k", good),
        "task 99 was not given": lambda: service.submit("me", 99, "k", good),
        "no flag 'fun'": lambda: service.submit("me", task.id, "k", good, flags={"fun": True}),
        "4000 are allowed": lambda: service.submit("me", task.id, "k", good, rationale="x" * 4001),
        "seconds is nan": lambda: service.submit("me", task.id, "k", good, seconds=float("nan")),
        "idempotency key": lambda: service.submit("me", task.id, "", good),
    }.items():
        with pytest.raises(DataError, match=problem):
            call()
    assert service.store.counts().rankings == 0


def test_skip_and_undo(make: Make) -> None:
    service = make(items=3)
    first = submit(service)
    second = given_task(service)
    service.skip("me", second.id)
    third = given_task(service)
    assert len({first.id, second.id, third.id}) == 3
    assert service.progress("me") == Progress(ranked=1, skipped=1, remaining=1)
    assert service.undo("me") == second.id
    assert given_task(service).id == second.id
    assert service.undo("me") == first.id
    again = given_task(service)
    assert again.id == first.id
    assert again.completions == first.completions
    assert again.before == Said(((0,), (1,), (2,), (3,)), (), {}, None)
    assert service.undo("me") is None
    assert service.store.rankings() == []
    service.submit("me", again.id, again.key, [[0, 1, 2, 3]])
    assert only(service).ranks == (1, 1, 1, 1)
    assert {given_task(service).id} == {second.id}, "then what was taken back before"


def test_an_undone_ranking_stays_in_the_store(make: Make) -> None:
    service = make()
    submit(service)
    service.undo("me")
    with service.store.read() as connection:
        rows = connection.execute(sa.select(schema.rankings.c.active)).scalars().all()
        kinds = connection.execute(sa.select(schema.events.c.kind).order_by(schema.events.c.id)).scalars().all()
    assert rows == [False]
    assert kinds == ["item", "item", "item", "assigned", "ranking", "done", "withdrawn", "open"]


def test_skipping_what_is_ranked_changes_nothing(make: Make) -> None:
    service = make()
    task = submit(service)
    service.skip("me", task.id)
    assert service.progress("me") == Progress(ranked=1, skipped=0, remaining=2)


def test_each_item_gets_as_many_annotators_as_wanted(make: Make) -> None:
    service = make(items=10, overlap=2)
    assert service.wanted() == 20
    for who in ("a", "b"):
        for _ in range(10):
            submit(service, who)
    assert service.wanted() == 0
    assert service.next_task("c") is None
    assert service.progress("c") == Progress(0, 0, 0)


def test_a_share_of_the_items_gets_one_more(make: Make) -> None:
    service = make(items=200, completions=2, overlap_share=0.25)
    assert service.wanted() == pytest.approx(250, abs=3 * (200 * 0.25 * 0.75) ** 0.5)
    assert LabelService(service.store, Policy(overlap_share=1.0)).wanted() == 400
    assert LabelService(service.store, Policy()).wanted() == 200


def test_a_round_is_ranked_by_itself(make: Make) -> None:
    service = make(items=2)
    service.store.add_completions("later", [Completion("x", "m", 0), Completion("y", "m", 1)], round=1)
    later = LabelService(service.store, Policy(round=1))
    assert given_task(later).prompt == "later"
    assert service.progress("me").remaining == 2
    submit(later)
    assert only(service).round == 1
    assert service.undo("me") is None


def test_a_lease_runs_out_and_a_late_submit_is_kept(make: Make) -> None:
    clock = Clock()
    service = make(items=1, clock=clock, lease_seconds=60)
    late = given_task(service, "slow")
    assert service.next_task("quick") is None
    clock.now += 61
    quick = given_task(service, "quick")
    service.submit("quick", quick.id, quick.key, in_order(quick))
    service.submit("slow", late.id, late.key, in_order(late))
    assert only(service).annotator == "quick", "one was wanted"
    assert {ranking.annotator: ranking.flags for ranking in service.store.rankings(late=True)} == {
        "quick": {},
        "slow": {"marks": ["late"]},
    }


def test_asking_again_renews_the_lease(make: Make) -> None:
    clock = Clock()
    service = make(items=1, clock=clock, lease_seconds=60)
    for _ in range(3):
        given_task(service, "slow")
        clock.now += 50
    assert service.next_task("quick") is None


def test_overlap_is_exact_with_everyone_at_once(make: Make) -> None:
    service = make(items=15, completions=2, overlap=2)
    failures: list[BaseException] = []

    def work(annotator: str) -> None:
        own = LabelService(Store(service.store.name), service.policy)
        try:
            while (task := own.next_task(annotator)) is not None:
                own.submit(annotator, task.id, task.key, in_order(task))
        except BaseException as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"a{number}",)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    rankings = service.store.rankings()
    assert Counter(ranking.prompt for ranking in rankings) == {f"prompt {n}": 2 for n in range(15)}  # pyright: ignore
    assert len({(str(ranking.prompt), ranking.annotator) for ranking in rankings}) == 30


def test_imported_rankings_take_their_place(make: Make) -> None:
    service = make(items=2, completions=2)
    service.store.import_rankings([Ranking("prompt 0", ("text 0.0", "text 0.1"), (1, 2), "guest")])
    assert service.wanted() == 1
    assert given_task(service).prompt == "prompt 1"
    assert service.undo("guest") is not None
    assert service.store.rankings() == []

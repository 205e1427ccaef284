"""The admins' use cases, against numbers worked out by hand, and for admins alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from argon2 import PasswordHasher

from labeling_ui import admin as admin_module
from labeling_ui.admin import Admin, Kept
from labeling_ui.auth import Accounts
from labeling_ui.downloads import DOWNLOADS, EVENTS, PREFERENCES, RANKINGS, write
from labeling_ui.passwords import Hashes
from labeling_ui.person import Person
from labeling_ui.places import Policy
from labeling_ui.quality import import_gold
from labeling_ui.service import LabelService
from rlhf.rankings import read_rankings
from rlhf.schema import assignments, events, rankings
from rlhf.store import Store, withdraw
from rlhf.types import Completion, DataError, Ranking
from rlhf.verification import verify

ROOT, ANNA = Person("root", "admin"), Person("anna", "annotator")
NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
TEXTS = ("a", "b", "c")


def ranking(prompt: str, who: str, ranks: tuple[int | None, ...], **more: Any) -> Ranking:
    return Ranking(prompt, TEXTS[: len(ranks)], ranks, who, **more)


@pytest.fixture
def store(store_url: str) -> Store:
    return Store(store_url)


@pytest.fixture
def admin(store: Store) -> Admin:
    return Admin(store, Policy(overlap=2, seed=3), clock=lambda: NOW, rest=0.0)


def add_items(store: Store, *prompts: str, round: int = 0) -> None:
    for prompt in prompts:
        store.add_completions(prompt, [Completion(text, "m", 0) for text in TEXTS], round=round)


# ------------------------------------------------------------------------------------------------ who may


USES: list[Callable[[Admin, Person], Any]] = [
    lambda admin, who: admin.overview(who),
    lambda admin, who: admin.together(who),
    lambda admin, who: admin.people(who),
    lambda admin, who: admin.paused(who),
    lambda admin, who: admin.labels(who),
    lambda admin, who: admin.disputed(who),
    lambda admin, who: admin.case(who, 1),
    lambda admin, who: admin.reveal(who, 1),
    lambda admin, who: admin.adjudicate(who, 1, "key", [[0], [1], [2]]),
    lambda admin, who: admin.take_back(who, 1),
    lambda admin, who: admin.pause(who, "anna", True),
]


@pytest.mark.parametrize("use", USES)
def test_annotators_are_refused(admin: Admin, store: Store, use: Callable[[Admin, Person], Any]) -> None:
    add_items(store, "p")
    with store.read() as connection:
        before = connection.scalar(sa.select(sa.func.max(events.c.id)))
    with pytest.raises(PermissionError, match="'anna' is not an admin"):
        use(admin, ANNA)
    with store.read() as connection:
        assert connection.scalar(sa.select(sa.func.max(events.c.id))) == before


def test_no_use_case_is_forgotten_above() -> None:
    public = {name for name, value in vars(Admin).items() if callable(value) and not name.startswith("_")}
    named = {name for use in USES for name in use.__code__.co_names}
    assert public - {"check"} == named


@pytest.mark.parametrize("name", DOWNLOADS)
def test_annotators_download_nothing(admin: Admin, tmp_path: Path, name: str) -> None:
    with pytest.raises(PermissionError):
        write(admin, ANNA, name, tmp_path / name)
    assert list(tmp_path.glob("*.jsonl")) == []


# ------------------------------------------------------------------------------------------------ the queue


def test_the_queue_by_hand(store: Store, admin: Admin) -> None:
    """Four items for two each: one complete, one ranked and held, one skipped and past its lease, one untouched."""
    add_items(store, "p1", "p2", "p3", "p4")
    add_items(store, "q", round=1)
    clock = [NOW - 3600]
    service = LabelService(store, admin.policy, clock=lambda: clock[0])
    given = {name: {} for name in ("anna", "bert")}
    for name, own in given.items():
        while task := service.next_task(name):
            own[task.prompt] = task
            service.skip(name, task.id)
    for name, prompt in (("anna", "p1"), ("bert", "p1"), ("anna", "p2")):
        task = given[name][prompt]
        service.reopen(name, task.id)
        flags = {"unsafe": True, "note": "a real name"} if prompt == "p2" else {"unclear": name == "anna"}
        service.submit(name, task.id, task.key, [[0], [1, 2]], flags=flags, seconds=10)
    service.reopen("anna", given["anna"]["p3"].id)
    clock[0] = NOW - 600
    service.reopen("bert", given["bert"]["p2"].id)
    found = admin.overview(ROOT)
    first, second = found.coverage
    assert (first.round, first.overlap, first.items, first.complete, first.wanted, first.done) == (0, 2, 4, 1, 8, 3)
    assert (first.in_hand, first.free) == (1, 4)
    assert (second.round, second.items, second.wanted, second.done) == (1, 1, 2, 0)
    assert [(each.annotator, each.minutes, each.expired) for each in found.held] == [
        ("anna", 60.0, True),
        ("bert", 10.0, False),
    ]
    assert (found.held_count, found.expired, found.skipped, found.late, found.remaining) == (2, 1, 3, 0, 7)
    assert found.flags == {"unclear": 1, "unsafe": 1, "note": 1}
    assert [(each.annotator, each.flags, each.note) for each in found.flagged] == [
        ("anna", ("unsafe",), "a real name"),
        ("anna", ("unclear",), None),
    ]
    assert (found.hours, found.days) == ((("2027-01-15T07", 3),), (("2027-01-15", 3),))
    assert (found.per_hour, found.minutes_left) == (None, None)


def test_the_pace_of_the_last_quarter_of_an_hour(store: Store, admin: Admin) -> None:
    prompts = [f"p{number}" for number in range(10)]
    add_items(store, *prompts)
    late = [NOW - 1800] * 2 + [NOW - 60] * 6
    for prompt, at in zip(prompts, late, strict=False):
        service = LabelService(store, admin.policy, clock=lambda at=at: at)
        task = service.next_task("anna")
        assert task is not None, prompt
        service.submit("anna", task.id, task.key, [[0], [1], [2]])
    found = admin.overview(ROOT)
    assert (found.per_hour, found.remaining) == (24.0, 12)
    assert found.minutes_left == 30.0


def test_what_came_too_late_or_too_fast_is_counted(store: Store, admin: Admin) -> None:
    add_items(store, "p")
    clock = [NOW]
    service = LabelService(store, Policy(overlap=1), clock=lambda: clock[0], words_per_second=0.5)
    slow, _ = service.next_task("anna"), clock.__setitem__(0, NOW + 7200)
    quick = service.next_task("bert")
    assert slow is not None
    assert quick is not None
    service.submit("bert", quick.id, quick.key, [[0], [1], [2]], seconds=1)
    service.submit("anna", slow.id, slow.key, [[0], [1], [2]], seconds=100)
    found = admin.overview(ROOT)
    assert (found.late, found.too_fast, found.coverage[0].done) == (1, 1, 1)


# ------------------------------------------------------------------------------------------------ numbers


def test_agreement_with_a_known_answer_that_is_not_zero(store: Store, admin: Admin) -> None:
    """a b c against a c b: 2 of 3 pairs alike, tau 1/3. a b c against b a = c, ties left out: 1 of 2 alike."""
    store.import_rankings([ranking("p", "anna", (1, 2, 3)), ranking("p", "bert", (1, 3, 2))])
    found = admin.together(ROOT)
    assert found.agreement.without_ties.value == pytest.approx(2 / 3)
    assert found.concordance.kendall_tau.value == pytest.approx(1 / 3)
    assert found.concordance.kendall_w.value == pytest.approx(12 * 6 / (4 * 24))  # rank sums 2, 5, 5
    assert (found.rankings, found.items, found.annotators, found.tie_share) == (2, 1, 2, 0.0)
    store.import_rankings([ranking("q", "anna", (1, 2, 3)), ranking("q", "bert", (2, 1, 2))])
    found = admin.together(ROOT)
    assert found.agreement.without_ties.value == pytest.approx(3 / 5)
    assert found.agreement.ties_as_half.value == pytest.approx(3.5 / 6)
    assert (found.items, found.tie_share) == (2, pytest.approx(1 / 12))


def test_disputes_by_hand(store: Store, admin: Admin) -> None:
    """Opposite on one of three pairs: 1/3. A tie against an order on two of three: 1/3, too. Agreed: not listed."""
    store.import_rankings(
        [
            *(ranking("p", who, ranks) for who, ranks in (("anna", (1, 2, 3)), ("bert", (1, 3, 2)))),
            *(ranking("q", who, ranks) for who, ranks in (("anna", (1, 2, 3)), ("bert", (3, 2, 1)))),
            *(ranking("r", who, (1, 2, 3)) for who in ("anna", "bert")),
            *(ranking("s", who, (1, 1, 1)) for who in ("anna", "bert")),
            *(ranking("t", who, ranks) for who, ranks in (("anna", (1, 1, 2)), ("bert", (1, 2, 2)))),
            ranking("u", "anna", (3, 2, 1)),
        ]
    )
    found = {each.prompt: each for each in admin.disputed(ROOT)}
    assert {name: each.disagreement for name, each in found.items()} == pytest.approx({"p": 1 / 3, "q": 1, "t": 1 / 3})
    assert admin.disputed(ROOT)[0].prompt == "q"
    assert len(admin.disputed(ROOT, limit=2)) == 2
    assert found["q"].doubt == pytest.approx(1.0, abs=0.05)  # one against one: nothing is known
    assert 0 < found["p"].doubt < 0.5
    assert all(each.annotators == 2 and each.adjudicated_by is None for each in found.values())


def test_a_random_clicker_leaves_less_doubt_than_two_careful_people(store: Store, admin: Admin) -> None:
    said = []
    for number in range(30):
        said += [ranking(f"p{number}", who, (1, 2, 3)) for who in ("anna", "bert")]
        said.append(ranking(f"p{number}", "click", ((3, 2, 1), (1, 2, 3), (2, 3, 1))[number % 3]))
    said += [ranking("x", "anna", (1, 2, 3)), ranking("x", "bert", (3, 2, 1))]
    said += [ranking("y", "anna", (1, 2, 3)), ranking("y", "click", (3, 2, 1))]
    store.import_rankings(said)
    found = {each.prompt: each for each in admin.disputed(ROOT, limit=100)}
    assert found["x"].disagreement == found["y"].disagreement == 1
    assert found["x"].doubt > 1.5 * found["y"].doubt


def test_people_and_their_seconds(store: Store, admin: Admin) -> None:
    times = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0)
    store.import_rankings([ranking(f"p{t}", "anna", (1, 2, 3), seconds=t) for t in times])
    found = admin.people(ROOT)
    assert [(each.name, each.rankings, each.median_seconds.value) for each in found.reports] == [("anna", 7, 40.0)]
    assert found.reports[0].agreement.without_ties.value is None
    assert {name: sorted(values) for name, values in found.seconds.items()} == {"anna": list(times)}


def test_known_answers_reach_the_numbers(store: Store, admin: Admin, tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    row = {"completions": list(TEXTS), "ranks": [1, 2, 3], "annotator": "g"}
    path.write_text("".join(json.dumps({"prompt": f"g{n}", **row}) + "\n" for n in range(4)))
    assert import_gold(store, path) == 4
    service = LabelService(store, Policy(gold_rate=0.5, seed=1))
    add_items(store, *(f"p{number}" for number in range(8)))
    while task := service.next_task("anna"):
        worst_first = sorted(range(3), key=lambda place: task.completions[place], reverse=True)
        service.submit("anna", task.id, task.key, [[place] for place in worst_first])
    gold = admin.people(ROOT).reports[0].gold
    assert (gold.value, gold.pairs) == (0.0, 12)


# ------------------------------------------------------------------------------------------------ kept


def test_dear_numbers_are_computed_once_for_each_state_of_the_store(
    store: Store, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fit = admin_module.fit_raters
    monkeypatch.setattr(admin_module, "fit_raters", lambda *args, **more: calls.append(1) or fit(*args, **more))
    store.import_rankings([ranking("p", who, (1, 2, 3)) for who in ("anna", "bert")])
    for _ in range(3):
        admin.people(ROOT), admin.disputed(ROOT), admin.labels(ROOT)
    assert len(calls) == 2  # one for the numbers; the labels also heed adjudications
    shown = admin.case(ROOT, 1)
    admin.adjudicate(ROOT, 1, shown.key, [[0], [1], [2]])
    admin.people(ROOT)
    assert len(calls) == 2  # adjudications are no annotator's
    store.import_rankings([ranking("p", "chen", (1, 2, 3))])
    assert [each.name for each in admin.people(ROOT).reports] == ["anna", "bert", "chen"]
    assert len(calls) == 3
    with store.write() as connection:
        withdraw(connection, 1)
    assert len(admin.people(ROOT).reports) == 2


def test_a_value_rests_as_many_times_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(admin_module.time, "monotonic", lambda: clock[0])

    def computed(value: str) -> Callable[[], str]:
        return lambda: (clock.__setitem__(0, clock[0] + 2.0), value)[1]

    kept = Kept[str](rest=10.0)
    assert kept.get(1, computed("first")) == "first"
    clock[0] += 19.9
    assert kept.get(2, computed("second")) == "first"
    clock[0] += 0.2
    assert kept.get(2, computed("second")) == "second"
    clock[0] += 1000
    assert kept.get(2, computed("third")) == "second"


# ------------------------------------------------------------------------------------------------ the last word


@pytest.fixture
def disputed(store: Store) -> Store:
    store.import_rankings([ranking("p", "anna", (1, 2, 3)), ranking("p", "bert", (3, 2, 1))])
    return store


def tiers(order: tuple[int, ...], best: str) -> list[list[int]]:
    """Places that put the stored completions in this order."""
    return [[order.index(TEXTS.index(letter))] for letter in best]


def test_an_adjudicated_item_yields_the_last_word_alone(disputed: Store, admin: Admin) -> None:
    shown = admin.case(ROOT, 1)
    assert sorted(shown.completions) == list(TEXTS)
    assert tuple(TEXTS[index] for index in shown.order) == shown.completions
    first = admin.adjudicate(ROOT, 1, shown.key, tiers(shown.order, "bac"), rationale=" as the guidelines say ")
    (last,) = disputed.rankings(resolved=True)
    assert (last.annotator, last.ranks, last.rationale) == ("root", (2, 1, 3), "as the guidelines say")
    assert last.presented_order == shown.order
    assert [each.annotator for each in disputed.rankings()] == ["anna", "bert"]
    again = admin.adjudicate(ROOT, 1, shown.key, tiers(shown.order, "bac"), rationale="as the guidelines say")
    assert (again.ranking_id, again.repeated) == (first.ranking_id, True)
    with pytest.raises(DataError, match="already saved another ranking"):
        admin.adjudicate(ROOT, 1, shown.key, tiers(shown.order, "cab"))
    assert admin.disputed(ROOT)[0].adjudicated_by == "root"
    assert admin.overview(ROOT).adjudicated == 1
    with disputed.read() as connection:
        assert verify(connection).holds


def test_another_word_supersedes_and_another_admin_too(disputed: Store, admin: Admin) -> None:
    for who, best in ((ROOT, "abc"), (ROOT, "cab"), (Person("eve", "admin"), "bca")):
        shown = admin.case(who, 1)
        admin.adjudicate(who, 1, shown.key, tiers(shown.order, best))
    (last,) = disputed.rankings(resolved=True)
    assert (last.annotator, last.ranks) == ("eve", (3, 1, 2))
    before = admin.case(ROOT, 1).before
    assert before is not None
    order = admin.case(ROOT, 1).order
    assert [TEXTS[order[tier[0]]] for tier in before.tiers] == ["c", "a", "b"]
    with disputed.read() as connection:
        own = connection.execute(
            sa.select(rankings.c.version, rankings.c.active)
            .join(assignments)
            .where(assignments.c.annotator == "root")
            .order_by(rankings.c.version)
        )
        assert [tuple(row) for row in own] == [(1, False), (2, True)]


def test_taken_back_the_annotators_count_again(disputed: Store, admin: Admin) -> None:
    shown = admin.case(ROOT, 1)
    admin.adjudicate(ROOT, 1, shown.key, [[0], [1], [2]])
    assert (admin.take_back(ROOT, 1), admin.take_back(ROOT, 1)) == (True, False)
    assert [each.annotator for each in disputed.rankings(resolved=True)] == ["anna", "bert"]
    assert (admin.disputed(ROOT)[0].adjudicated_by, admin.overview(ROOT).adjudicated) == (None, 0)
    shown = admin.case(ROOT, 1)
    admin.adjudicate(ROOT, 1, shown.key, [[0], [1], [2]])
    assert len(disputed.rankings(resolved=True)) == 1
    with disputed.read() as connection:
        assert verify(connection).holds


def test_who_looked_first_is_on_record(disputed: Store, admin: Admin) -> None:
    eve = Person("eve", "admin")
    for who in (ROOT, eve):
        shown = admin.case(who, 1)
        if who is eve:
            said = admin.reveal(eve, 1)
            assert [(each.annotator, each.kind) for each in said] == [
                ("anna", "task"),
                ("bert", "task"),
                ("root", "adjudication"),
            ]
            anna = [TEXTS[shown.order[tier[0]]] for tier in said[0].said.tiers]
            assert anna == ["a", "b", "c"]
        admin.adjudicate(who, 1, shown.key, [[0], [1], [2]])
    with disputed.read() as connection:
        marks = connection.execute(
            sa.select(assignments.c.annotator, rankings.c.marks)
            .join(rankings)
            .where(assignments.c.kind == "adjudication")
        )
        assert dict(tuple(row) for row in marks) == {"root": [], "eve": ["revealed"]}


def test_what_cannot_be_adjudicated(disputed: Store, admin: Admin, tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_text(json.dumps({"prompt": "g", "completions": ["x", "y"], "ranks": [1, 2], "annotator": "g"}))
    import_gold(disputed, path)
    with pytest.raises(DataError, match="there is no item 99"):
        admin.case(ROOT, 99)
    with pytest.raises(DataError, match="item 2 is a gold item"):
        admin.adjudicate(ROOT, 2, "key", [[0], [1]])
    with pytest.raises(DataError, match="rank each completion once"):
        admin.adjudicate(ROOT, 1, "key", [[0], [1]])
    admin.adjudicate(ROOT, 1, "key", [], [0, 1, 2], flags={"all_bad": True})
    assert disputed.rankings(resolved=True)[0].ranks == (None, None, None)


def test_annotators_never_see_an_adjudication(disputed: Store, admin: Admin) -> None:
    shown = admin.case(ROOT, 1)
    admin.adjudicate(ROOT, 1, shown.key, [[0], [1], [2]])
    service = LabelService(disputed, admin.policy)
    assert service.progress("root").ranked == 0
    assert service.recent("root") == []
    assert service.undo("root") is None


# ------------------------------------------------------------------------------------------------ people, downloads


def test_who_is_paused_gets_nothing_until_resumed(store: Store) -> None:
    accounts = Accounts(store, hashes=Hashes(PasswordHasher(1, 8, 1)))
    accounts.join(accounts.invite("annotator", "anna"), "anna", "correct horse battery")
    admin = Admin(store, Policy(), accounts=accounts)
    add_items(store, "p")
    service = LabelService(store, admin.policy)
    admin.pause(ROOT, "anna", True)
    assert admin.paused(ROOT) == {"anna": True}
    with pytest.raises(DataError, match="paused"):
        service.next_task("anna")
    admin.pause(ROOT, "anna", False)
    assert service.next_task("anna") is not None
    with pytest.raises(DataError, match="no account 'bert'"):
        admin.pause(ROOT, "bert", True)
    with store.read() as connection:
        said = connection.execute(sa.select(events.c.kind).order_by(events.c.id)).scalars().all()
    assert [kind for kind in said if kind in ("paused", "resumed")] == ["paused", "resumed"]


def test_without_accounts_nobody_is_paused(admin: Admin) -> None:
    assert admin.paused(ROOT) == {}
    with pytest.raises(DataError, match="no accounts"):
        admin.pause(ROOT, "anna", True)


def test_what_is_downloaded(disputed: Store, admin: Admin, tmp_path: Path) -> None:
    disputed.import_rankings([ranking("q", "anna", (1, 2, None))])
    shown = admin.case(ROOT, 1)
    admin.adjudicate(ROOT, 1, shown.key, tiers(shown.order, "abc"))
    for name in DOWNLOADS:
        write(admin, ROOT, name, tmp_path / name)
    found = read_rankings(tmp_path / RANKINGS)
    assert {(each.annotator, each.ranks) for each in found.rankings} == {("root", (1, 2, 3)), ("anna", (1, 2, None))}
    pairs = [json.loads(line) for line in (tmp_path / PREFERENCES).read_text().splitlines()]
    assert len(pairs) == 4
    (only,) = [pair for pair in pairs if pair["prompt"] == "q"]
    last_word = {("a", "b"), ("a", "c"), ("b", "c")}
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs if pair["prompt"] != "q"} == last_word
    assert (only["chosen"], only["rejected"]) == ("a", "b")
    assert 0.5 < only["probability"] < 1
    assert 0 < only["weight"] < 1
    logged = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert [each["id"] for each in logged] == list(range(1, len(logged) + 1))
    assert all(one["hash"] == other["previous"] for one, other in pairwise(logged))
    assert logged[-2]["body"]["ranks"] == [1, 2, 3]

"""Simulated annotators: what is planted in them is found in what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeling_ui.agreement import agreement, tie_share, wins_by_place
from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService, Task
from labeling_ui.simulate import Annotator, annotators, simulate
from rlhf.config import LabelConfig, Simulation
from rlhf.store import Store
from rlhf.types import Completion, ConfigError, DataError, Prompt, Ranking

HERE = "taste"
"""The module in which the utilities lie while a test runs."""


def last_number(prompt: Prompt, text: str) -> float:
    return float(text.split()[-1])


@pytest.fixture(autouse=True)
def taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{HERE}.py").write_text(
        "def last_number(prompt, text): return float(text.split()[-1])\n"
        "def in_other_units(prompt, text): return 7 + 2.0**20 * last_number(prompt, text)\n"
        "def same(prompt, text): return 3.0\n"
        "def word(prompt, text): return 'good'\n"
        "def nan(prompt, text): return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def make_store(path: Path, items: int, scale: float = 1.0, completions: int = 4) -> Store:
    rng = np.random.default_rng(1)
    store = Store(path)
    for number in range(items):
        values = scale * (rng.standard_normal(completions) + 20 * rng.standard_normal())
        store.add_completions(f"p{number}", [Completion(f"text {value!r}", "m", 0) for value in values.tolist()])
    return store


def run(store: Store, share: float = 0.2, **settings: float) -> list[Ranking]:
    config = Simulation(utility=f"{HERE}:last_number", **settings)  # pyright: ignore
    count = simulate(LabelService(store, Policy(overlap_share=share)), config)
    assert count == store.counts().rankings
    return store.rankings()


def test_the_defaults_agree_as_people_do(tmp_path: Path) -> None:
    rankings = run(make_store(tmp_path / "a.db", 70), share=1.0)
    assert len(rankings) == 140
    found = agreement(rankings)
    for rate in (found.without_ties, found.ties_as_half):
        assert rate.value is not None
        assert 0.70 < rate.value < 0.85
        assert rate.pairs > 300
    assert 0.02 < (tie_share(rankings) or 0) < 0.2
    assert len({ranking.annotator for ranking in rankings}) == 5


def test_the_default_share_of_doubles_makes_agreement_measurable(tmp_path: Path) -> None:
    config = LabelConfig(simulate=Simulation(utility=f"{HERE}:last_number"))
    rankings = run(make_store(tmp_path / "a.db", 60), share=config.overlap_share)
    assert 66 <= len(rankings) <= 80
    assert agreement(rankings).items == len(rankings) - 60


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0])
def test_agreement_is_that_of_the_closed_form(temperature: float) -> None:
    """Differences as two judges see them correlate by 1 / (1 + t^2): the same sign with 1/2 + asin(that) / pi."""
    judges = [Annotator(name, temperature, 0.0, 0.0, seed=0) for name in ("one", "two")]
    rng = np.random.default_rng(0)
    rankings = []
    for number in range(1500):
        task = Task(number, f"p{number}", ("a", "b"), "key")
        utilities = rng.standard_normal(2)
        for judge in judges:
            tiers = judge.rank(task, utilities.tolist())
            rankings.append(Ranking(task.prompt, task.completions, (1, 2) if tiers[0] == [0] else (2, 1), judge.name))
    expected = 0.5 + math.asin(1 / (1 + temperature**2)) / math.pi
    error = math.sqrt(expected * (1 - expected) / 1500)
    assert agreement(rankings).without_ties.value == pytest.approx(expected, abs=3 * error)


def test_without_noise_they_rank_by_utility(tmp_path: Path) -> None:
    rankings = run(make_store(tmp_path / "a.db", 20), temperature=0, position_bias=0, tie_threshold=0)
    for ranking in rankings:
        values = [last_number("", text) for text in ranking.completions]
        assert np.argsort(values)[::-1].tolist() == np.argsort([rank or 0 for rank in ranking.ranks]).tolist()


def test_the_unit_of_the_utility_does_not_matter(tmp_path: Path) -> None:
    small, large = make_store(tmp_path / "a.db", 15), make_store(tmp_path / "b.db", 15)
    run(small)
    simulate(LabelService(large, Policy(overlap_share=0.2)), Simulation(utility=f"{HERE}:in_other_units"))
    assert small.content_hash() == large.content_hash()


def test_a_planted_position_bias_is_found(tmp_path: Path) -> None:
    wins = wins_by_place(run(make_store(tmp_path / "a.db", 60), share=0, position_bias=2.0))
    assert wins == sorted(wins, reverse=True)  # pyright: ignore
    assert (wins[0] or 0) > 0.65
    assert (wins[-1] or 1) < 0.35


def test_without_position_bias_no_place_is_better(tmp_path: Path) -> None:
    wins = wins_by_place(run(make_store(tmp_path / "a.db", 60), share=0, position_bias=0.0))
    assert all(abs((share or 0) - 0.5) < 0.11 for share in wins)  # three standard errors of 60 rankings


def test_same_seed_same_rankings_whatever_happened_between(tmp_path: Path) -> None:
    once = make_store(tmp_path / "a.db", 15)
    run(once)
    resumed = make_store(tmp_path / "b.db", 15)
    service = LabelService(resumed, Policy(overlap_share=0.2))
    service.next_task("simulated-2")  # as if the process had died here
    config = Simulation(utility=f"{HERE}:last_number")
    simulate(service, config)
    assert simulate(service, config) == 0
    assert resumed.content_hash() == once.content_hash()
    other = make_store(tmp_path / "c.db", 15)
    run(other, seed=1)
    assert other.content_hash() != once.content_hash()


@pytest.mark.parametrize("said", [1, 2, 7])
def test_broken_off_between_two_turns_the_same_annotator_ranks_the_same_item(tmp_path: Path, said: int) -> None:
    once, resumed = make_store(tmp_path / "a.db", 15), make_store(tmp_path / "b.db", 15)
    run(once)
    service = LabelService(resumed, Policy(overlap_share=0.2))
    plain, calls = service.submit, iter(range(100))

    def break_off(*arguments: Any, **options: Any) -> Any:
        if next(calls) == said:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    service.submit = break_off
    config = Simulation(utility=f"{HERE}:last_number")
    with pytest.raises(KeyboardInterrupt):
        simulate(service, config)
    service.submit = plain
    simulate(service, config)
    assert resumed.content_hash() == once.content_hash()


def test_annotators_differ_and_equal_texts_tie(tmp_path: Path) -> None:
    people = annotators(Simulation(utility="a:b", annotators=50))
    logs = np.log([each.temperature for each in people])
    assert np.std(logs) == pytest.approx(0.2, rel=0.25)
    store = Store(tmp_path / "a.db")
    for number in range(4):
        texts = [Completion(text, "m", 0) for text in ("x 1", "x 1", "y 3")]
        store.add_completions(f"p{number}", texts)
    assert all(r.ranks[0] == r.ranks[1] for r in run(store, position_bias=0.0))


@pytest.mark.parametrize(
    ("utility", "kind", "problem"),
    [
        ("word", DataError, "returned 'good'"),
        ("nan", DataError, "returned nan"),
        ("same", DataError, "nothing to rank by"),
        ("missing", ConfigError, "has no 'missing'"),
    ],
)
def test_a_utility_that_is_none(tmp_path: Path, utility: str, kind: type[Exception], problem: str) -> None:
    service = LabelService(make_store(tmp_path / "a.db", 3), Policy())
    with pytest.raises(kind, match=problem):
        simulate(service, Simulation(utility=f"{HERE}:{utility}"))
    assert service.store.counts().rankings == 0

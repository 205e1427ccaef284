"""The planted truths of `experiments.labeling`, in a size for every day; the full one is 200 data sets."""

from __future__ import annotations

import pytest

from experiments.labeling import planted
from experiments.labeling.people import PEOPLE, rankings


def test_the_planted_are_found_and_the_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds are what 4 data sets allow: where 95 % are covered, less than 82 % of 28 is a chance of 1 in 500."""
    monkeypatch.setattr(planted, "POPULATION", 1500)
    planted.true_agreement.cache_clear()
    found = planted.measure(4, first_seed=1000)
    planted.true_agreement.cache_clear()
    recovered = {share.name: share.share for share in found.recovered}
    for name in ("order bias is flagged", "the clicker is flagged", "the spammer is flagged"):
        assert recovered[name] >= 0.75, found.recovered
    assert recovered["the expert is the most reliable"] >= 0.75
    assert {share.name: share.of for share in found.coverage}["reliability"] == 28
    for share in found.coverage:
        assert share.of < 28 or share.share >= 0.82, found.coverage_by_person


def test_people_are_what_they_are_planted_as() -> None:
    said = rankings(0, prompts=300)
    own = {person.name: [each for each in said if each.annotator == person.name] for person in PEOPLE}
    assert all([each.ranks[i] for i in each.presented_order or ()] == [1, 2, 3, 4] for each in own["spammer"])
    first = {
        name: sum(each.ranks[(each.presented_order or (0,))[0]] == 1 for each in of) / len(of)
        for name, of in own.items()
    }
    assert first["swayed"] > 0.4
    assert 0.15 < first["ann"] < 0.4
    assert rankings(0, prompts=5) == rankings(0, prompts=5)
    assert rankings(0, prompts=5) != rankings(1, prompts=5)

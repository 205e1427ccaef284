"""Coefficients of rankings: the right units, the right pairs, and intervals that cover."""

from __future__ import annotations

import math
from itertools import combinations

import krippendorff
import numpy as np
import pytest
from scipy import stats

from labeling_ui.concordance import concordance, ratings_agreement
from labeling_ui.references import REFERENCES, references
from rlhf.types import Ranking


def said(annotator: str, *ranks: int | None, prompt: str = "p", **flags: object) -> Ranking:
    return Ranking(prompt, tuple("abcdef"[: len(ranks)]), ranks, annotator, flags=flags)


def noisy(prompts: int, seed: int = 0, annotators: str = "xyz", size: int = 4) -> list[Ranking]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(prompts):
        quality = rng.standard_normal(size)
        for name in annotators:
            ranks = np.unique(np.round(quality + rng.standard_normal(size)), return_inverse=True)[1] + 1
            found.append(said(name, *ranks.tolist(), prompt=str(number)))
    return found


def test_tau_and_w_by_hand() -> None:
    # x and y: 3 of 3 pairs alike, tau 1; x and z, y and z: 1 of 3, tau -1/3. Sums of ranks 4, 7, 7 about 6: S = 6.
    found = concordance([said("x", 1, 2, 3), said("y", 1, 2, 3), said("z", 2, 3, 1)])
    assert found.kendall_tau.value == pytest.approx((1 - 1 / 3 - 1 / 3) / 3)
    assert found.kendall_tau.pairs == 3
    assert found.kendall_w.value == pytest.approx(12 * 6 / (9 * 24))
    assert found.kendall_w.pairs == 1


def test_tau_is_a_mean_over_prompts_not_over_pairs() -> None:
    three = [said(name, 1, 2) for name in "xyz"]
    found = concordance([*three, said("x", 1, 2, prompt="q"), said("y", 2, 1, prompt="q")])
    assert found.kendall_tau.value == pytest.approx((1 - 1) / 2)
    assert found.kendall_tau.pairs == 4


def test_alpha_of_ranks_is_the_librarys_on_midranks() -> None:
    rankings = noisy(20)
    units = {}
    for ranking in rankings:
        for text, place in zip(ranking.completions, stats.rankdata(ranking.ranks), strict=True):
            units.setdefault((ranking.prompt, text), {})[ranking.annotator] = place
    table = [[unit.get(name, math.nan) for unit in units.values()] for name in "xyz"]
    found = concordance(rankings).alpha_ranks
    assert found.value == pytest.approx(krippendorff.alpha(table, level_of_measurement="ordinal"), abs=1e-9)
    assert found.pairs == 80


def test_setting_a_completion_aside_is_no_disagreement_on_the_others() -> None:
    """Both prefer the second to the third; that one of them gives the first no place moves neither."""
    agreed = [said("x", 1, 2, 3, prompt=p) for p in "pq"] + [said("y", None, 1, 2, prompt=p) for p in "pq"]
    assert concordance(agreed).alpha_ranks.value == pytest.approx(1)


def test_alpha_of_pairs_is_the_librarys_whichever_way_the_completions_stand() -> None:
    rankings = noisy(20)
    found = concordance(rankings).alpha_pairs
    turned = [Ranking(r.prompt, r.completions[::-1], r.ranks[::-1], r.annotator) for r in rankings]
    assert concordance(turned).alpha_pairs == found
    assert found.pairs == 120
    # with both orientations of every pair there is no orientation to choose: n times two, and alpha nearly the same
    units = {}
    for ranking in rankings:
        for (i, a), (j, b) in combinations(enumerate(ranking.ranks), 2):
            units.setdefault((ranking.prompt, i, j), {})[ranking.annotator] = np.sign((b or 0) - (a or 0))
            units.setdefault((ranking.prompt, j, i), {})[ranking.annotator] = np.sign((a or 0) - (b or 0))
    table = [[unit[name] for unit in units.values()] for name in "xyz"]
    expected = krippendorff.alpha(table, level_of_measurement="nominal")
    assert found.value == pytest.approx(expected, abs=0.01)


def test_who_ranked_nothing_in_common_says_nothing() -> None:
    for rankings in ([], [said("x", 1, 2), said("y", 1, 2, prompt="q")]):
        found = concordance(rankings)
        assert found.kendall_tau.value is found.alpha_ranks.value is found.alpha_pairs.value is None
        assert found.kendall_w.value is found.w_significance is None
    partly = concordance([said("x", 1, 2, None, None), said("y", None, None, 1, 2)])
    assert partly.kendall_tau.value is partly.kendall_w.value is None


def test_the_same_annotator_twice_is_one() -> None:
    found = concordance([said("x", 1, 2, 3), said("x", 3, 2, 1), said("y", 3, 2, 1)])
    assert found.kendall_tau.value == 1
    assert found.kendall_tau.pairs == 1


def test_intervals_cover_the_value_of_many_prompts() -> None:
    truth = concordance(noisy(1500, seed=99), bootstrap=1, permutations=0)
    covered = np.zeros(4)
    for seed in range(60):
        found = concordance(noisy(40, seed), bootstrap=400, permutations=0)
        for i, name in enumerate(("kendall_tau", "kendall_w", "alpha_ranks", "alpha_pairs")):
            rate = getattr(found, name)
            covered[i] += rate.low <= getattr(truth, name).value <= rate.high
    assert (covered >= 51).all(), covered  # fewer with a chance of 1 in 500 where 95 % are covered


def test_flags_and_ratings() -> None:
    rankings = [
        said("x", 1, 2, unsafe=True, ratings={"helpful": [5, 1]}, note="no"),
        said("y", 1, 2, unsafe=True, ratings={"helpful": [4, None]}),
        said("x", 1, 2, prompt="q", ratings={"helpful": [3, 3]}),
        said("y", 1, 2, prompt="q", unsafe=False, ratings={"helpful": [3, 3]}),
    ]
    found = ratings_agreement(rankings)
    assert found.keys() == {"unsafe", "helpful"}
    assert found["unsafe"].value == 1
    assert found["unsafe"].pairs == 2
    # 5 and 4: 1 - 1/16; twice alike. Shares of 4 units: 1 once, 3 twice, 4 and 5 half each.
    seen, total = (15 / 16 + 2) / 3, 25 - 2 * (4 * 1 + 3 * 4 + 2 * 9 + 16) / 16
    shares = np.array([1, 0, 2, 0.5, 0.5]) / 4
    chance = total * (shares * (1 - shares)).sum() / 20
    assert found["helpful"].value == pytest.approx((seen - chance) / (1 - chance), abs=1e-12)
    assert found["helpful"].pairs == 3


def test_references_are_the_published_ones() -> None:
    pairwise = {each.value: each for each in references("pairwise")}
    assert list(pairwise) == sorted(pairwise, reverse=True)
    assert (pairwise[0.726].spread, pairwise[0.773].spread) == (0.015, 0.013)
    assert all(each.source for each in REFERENCES)
    assert all(0 < each.value < 1 for each in REFERENCES)

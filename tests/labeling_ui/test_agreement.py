"""Agreement against numbers counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from labeling_ui.agreement import agreement, agreement_with_others, tie_share, wins_by_place
from rlhf.types import Ranking

ABC = ("a", "b", "c")


def said(annotator: str, *ranks: int | None, prompt: str = "p", order: tuple[int, ...] | None = None) -> Ranking:
    return Ranking(prompt, tuple("abcdef"[: len(ranks)]), ranks, annotator, order)


def test_counted_by_hand() -> None:
    # Pairs of x and y: ab agree, ac x says a and y says c, bc x ties. Of x and z: ab both a, ac and bc z did not rank.
    # Of y and z: ab agree. Without ties 3 of 4; as half (1 + 0 + 1/2) + 1 + 1 of 5.
    found = agreement([said("x", 1, 2, 2), said("y", 2, 3, 1), said("z", 1, 2, None)])
    assert found.items == 1
    assert (found.without_ties.value, found.without_ties.pairs) == (3 / 4, 4)
    assert (found.ties_as_half.value, found.ties_as_half.pairs) == (3.5 / 5, 5)


def test_two_ties_agree_by_half_as_coins_would() -> None:
    found = agreement([said("x", 1, 1), said("y", 1, 1)])
    assert found.without_ties.value is None
    assert found.ties_as_half.value == 0.5


def test_only_the_same_texts_in_the_same_round_are_shared() -> None:
    alone = [said("x", 1, 2), said("y", 1, 2, prompt="q"), said("x", 1, 2, 3), said("x", 2, 1)]
    found = agreement(alone)
    assert found.items == 0
    assert found.without_ties == found.ties_as_half
    assert found.without_ties.value is None


def test_swapped_orders_never_agree_and_equal_ones_always() -> None:
    rankings = [said("x", 1, 2, 3), said("y", 3, 2, 1)]
    assert agreement(rankings).without_ties.value == 0
    equal = [said(who, 1, 2, 3, prompt=str(n)) for who in "xy" for n in range(5)]
    rate = agreement(equal).without_ties
    assert (rate.value, rate.pairs) == (1.0, 15)
    certain = stats.binomtest(5, 5).proportion_ci(method="wilson")  # five prompts, whatever number of pairs
    assert (rate.low, rate.high) == pytest.approx((certain.low, certain.high))


def test_the_interval_is_that_of_the_prompts_not_of_the_pairs() -> None:
    """200 prompts, of which all 6 pairs agree or none does: the error is that of 200 draws, not of 1200."""
    rng = np.random.default_rng(0)
    rankings = []
    for number in range(200):
        rankings.append(said("x", 1, 2, 3, 4, prompt=str(number)))
        rankings.append(said("y", *((1, 2, 3, 4) if rng.random() < 0.7 else (4, 3, 2, 1)), prompt=str(number)))
    rate = agreement(rankings, bootstrap=4000).without_ties
    assert rate.value is not None
    assert rate.low is not None
    assert rate.high is not None
    width = 2 * 1.96 * math.sqrt(rate.value * (1 - rate.value) / 200)
    assert rate.high - rate.low == pytest.approx(width, rel=0.1)


def test_with_others_leaves_out_the_pairs_of_others() -> None:
    rankings = [said("x", 1, 2, 3), said("y", 1, 2, 3), said("z", 3, 2, 1), said("z", 1, 2, prompt="alone")]
    found = agreement_with_others(rankings)
    assert {name: (each.without_ties.value, each.without_ties.pairs) for name, each in found.items()} == {
        "x": (0.5, 6),
        "y": (0.5, 6),
        "z": (0.0, 6),
    }
    assert found["z"].items == 1


def test_few_prompts_have_wider_intervals_than_the_plain_percentiles() -> None:
    """For 8 prompts Student's t is 2.36 where the normal is 1.96, and the plain bootstrap is too narrow on top."""
    rankings, shares = [], []
    for number in range(8):
        turned = (0, 2, 3, 4)[number % 4]  # so many completions at the top the other way round
        ranks = [*range(turned, 0, -1), *range(turned + 1, 7)]
        rankings += [said("x", 1, 2, 3, 4, 5, 6, prompt=str(number)), said("y", *ranks, prompt=str(number))]
        shares.append(1 - turned * (turned - 1) / 30)
    rate = agreement(rankings, bootstrap=20_000).without_ties
    assert rate.value == pytest.approx(np.mean(shares))
    width = 2 * stats.t.ppf(0.975, 7) * np.std(shares, ddof=1) / math.sqrt(8)
    assert (rate.high or 0) - (rate.low or 0) == pytest.approx(width, rel=0.07)


def test_the_same_seed_gives_the_same_interval() -> None:
    rankings = [
        said(who, *order, prompt=str(n)) for n in range(9) for who, order in (("x", (1, 2)), ("y", (1 + n % 2, 2)))
    ]
    assert agreement(rankings, seed=3) == agreement(rankings, seed=3)


def test_tie_share() -> None:
    assert tie_share([said("x", 1, 1, 2), said("y", 1, None, 1)]) == 2 / 4
    assert tie_share([]) is None


def test_wins_by_place() -> None:
    # Shown c, a, b. Ranked b best, then a and c tied: place 0 (c) has 1/2 + 0, place 1 (a) 1/2 + 0, place 2 (b) 1 + 1.
    assert wins_by_place([said("x", 2, 1, 2, order=(2, 0, 1))]) == [0.25, 0.25, 1.0]
    assert wins_by_place([said("x", 1, 2)]) == []

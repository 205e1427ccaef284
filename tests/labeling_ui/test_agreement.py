"""Agreement against numbers counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labeling_ui.agreement import agreement, tie_share, wins_by_place
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
    assert (rate.value, rate.low, rate.high, rate.pairs) == (1.0, 1.0, 1.0, 15)


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

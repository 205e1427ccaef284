"""Numbers about one annotator, counted by hand; and the concerns that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from labeling_ui.annotators import MEANING, annotator_reports, median
from labeling_ui.raters import RaterModel
from rlhf.types import Ranking

NOBODY = RaterModel((), 1.0, ())


def said(annotator: str, *ranks: int | None, prompt: str = "p", **more: object) -> Ranking:
    return Ranking(prompt, tuple("abcdef"[: len(ranks)]), ranks, annotator, **more)  # pyright: ignore


def test_counted_by_hand() -> None:
    # The second time x turns ab and keeps ac and bc; the answer orders ab and ac (bc tied): x ties ab and has ac right.
    repeats = [(said("x", 1, 2, 3), said("x", 2, 1, 3))]
    gold = [(said("x", 1, 1, 2, prompt="g"), said("gold", 1, 2, 2, prompt="g"))]
    rankings = [said("x", 1, 2, 3), said("y", 1, 3, 2), said("x", 1, 1, 2, prompt="q")]
    x, y = annotator_reports(rankings, repeats=repeats, gold=gold, model=NOBODY)
    assert (x.name, y.name, x.rankings) == ("x", "y", 2)
    assert (x.agreement.without_ties.value, x.agreement.without_ties.pairs) == (pytest.approx(2 / 3), 3)
    assert (x.self_consistency.value, x.self_consistency.pairs) == (pytest.approx(2 / 3), 3)
    assert (x.gold.value, x.gold.pairs) == (pytest.approx(1.5 / 2), 2)
    assert (x.ties.value, x.ties.pairs) == (pytest.approx(1 / 6), 6)
    assert y.self_consistency.value is y.gold.value is None
    assert x.reliability.value is x.position_bias.value is None
    assert x.warnings == y.warnings == ()


def test_too_little_is_none_and_its_count_stays() -> None:
    rankings = [said(name, 1, 2, prompt=str(i), presented_order=(0, 1), seconds=3.0) for i in range(4) for name in "xy"]
    report, _ = annotator_reports(rankings)
    assert report.reliability.value is None
    assert report.reliability.pairs == 4
    assert (report.shown_order.value, report.shown_order.pairs) == (None, 4)
    assert (report.too_fast.value, report.too_fast.pairs) == (None, 4)
    assert (report.median_seconds.value, report.median_seconds.pairs) == (None, 4)


def test_shown_order_and_too_fast() -> None:
    rankings = [
        said("x", 2, 1, 3, prompt=str(i), presented_order=(1, 0, 2), seconds=2.0, flags={"marks": ["too_fast"]})
        for i in range(20)
    ]
    rankings += [said("y", 2, 1, 3, prompt=str(i), presented_order=(0, 1, 2), seconds=60.0) for i in range(20)]
    x, y = annotator_reports(rankings, model=NOBODY)
    assert x.shown_order.value == x.too_fast.value == 1
    assert y.shown_order.value == y.too_fast.value == 0
    wilson = stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert (x.too_fast.low, x.too_fast.high) == pytest.approx((wilson.low, wilson.high))
    assert set(x.warnings) == {"shown_order", "too_fast"}
    assert not y.warnings
    assert all(concern in MEANING for concern in x.warnings)


def test_inconsistent_and_wrong_on_gold() -> None:
    rng = np.random.default_rng(0)
    repeats, gold = [], []
    for i in range(30):
        repeats.append(
            (said("x", 1, 2, 3, prompt=str(i)), said("x", *(rng.permutation(3) + 1).tolist(), prompt=str(i)))
        )
        gold.append(
            (said("x", *(rng.permutation(3) + 1).tolist(), prompt=f"g{i}"), said("gold", 1, 2, 3, prompt=f"g{i}"))
        )
    (x,) = annotator_reports([], repeats=repeats, gold=gold, model=NOBODY)
    assert set(x.warnings) == {"inconsistent", "gold"}


def test_who_is_reversed_is_told_from_one_who_guesses() -> None:
    rng = np.random.default_rng(1)
    rankings = []
    for i in range(80):
        order = (rng.permutation(3) + 1).tolist()
        answers = {
            "a": order,
            "b": order,
            "upside": [4 - rank for rank in order],
            "dice": (rng.permutation(3) + 1).tolist(),
        }
        shown = tuple(rng.permutation(3).tolist())
        rankings += [said(name, *ranks, prompt=str(i), presented_order=shown) for name, ranks in answers.items()]
    found = {report.name: report for report in annotator_reports(rankings)}
    assert "reversed" in found["upside"].warnings
    assert "guessing" in found["dice"].warnings
    assert not {"reversed", "guessing"} & {*found["a"].warnings, *found["b"].warnings}


@pytest.mark.parametrize("count", [6, 7, 20, 51])
def test_median_interval_holds_the_median_in_95_of_100_at_least(count: int) -> None:
    """Exactly: the chance that the order statistics enclose it is a sum of binomials."""
    values = list(range(count))
    rate = median(values)
    low, high = int(rate.low or 0), int(rate.high or 0)
    covered = stats.binom.cdf(high, count, 0.5) - stats.binom.cdf(low, count, 0.5)
    assert covered >= 0.95
    narrower = stats.binom.cdf(high - 1, count, 0.5) - stats.binom.cdf(low + 1, count, 0.5)
    assert narrower < 0.95
    assert rate.value == np.median(values)

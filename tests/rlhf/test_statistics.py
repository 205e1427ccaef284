"""Statistics against scipy, exact enumeration and published numbers."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlhf.statistics import (
    Estimate,
    best_of_n_expectation,
    best_of_n_kl,
    bootstrap_mean,
    ceiling,
    distinct_n,
    expected_calibration_error,
    outcomes,
    pair_accuracy,
    wilson,
    win_rate,
)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case: tuple[int, int]) -> None:
    wins, n = case
    expected = stats.binomtest(wins, n).proportion_ci(method="wilson")
    found = wilson(wins, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == wins / n


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(55, 100, 0.452, 0.644), (110, 200, 0.481, 0.617), (275, 500, 0.506, 0.593), (550, 1000, 0.519, 0.581)],
)
def test_wilson_published(wins: int, n: int, low: float, high: float) -> None:
    found = wilson(wins, n)
    assert (round(found.low, 3), round(found.high, 3)) == (low, high)


def test_wilson_of_nothing() -> None:
    found = wilson(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)


def test_outcomes() -> None:
    assert outcomes([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).tolist() == [0.0, 0.5, 1.0]


def test_ties_count_half() -> None:
    assert win_rate([1, 0.5, 0.5, 0], [0, 1, 2, 3]).value == 0.5
    assert win_rate([1, 0.5], [0, 0]).value == 0.75


def test_bootstrap_agrees_with_scipy_where_prompts_are_single() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=80)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    found = bootstrap_mean(values, resamples=20_000)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.value == pytest.approx(values.mean(), abs=1e-14)


def test_bootstrap_of_unequal_prompts_equals_full_enumeration() -> None:
    clusters = [[1.0], [0.0] * 9, [0.5, 1.0, 0.5], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0.0]]
    prompts = np.repeat([7, 9, 4, 1, 3], [len(cluster) for cluster in clusters])
    means = [
        np.concatenate([clusters[i] for i in draw]).mean() for draw in itertools.product(range(5), repeat=5)
    ]  # all 3125 draws of five prompts, each as likely as the others
    found = win_rate(np.concatenate(clusters), prompts, resamples=40_000)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.01)


def test_bootstrap_covers_at_its_level_where_prompts_differ() -> None:
    rng = np.random.default_rng(3)
    covered = naive = 0
    for trial in range(200):
        ability = rng.choice([0.2, 0.9], size=60)  # prompts are easy or hard, truth 0.55
        wins = (rng.random((60, 4)) < ability[:, None]).astype(float).ravel()
        found = win_rate(wins, np.repeat(np.arange(60), 4), seed=trial, resamples=400)
        covered += found.low <= 0.55 <= found.high
        alone = wilson(wins.sum(), wins.size)
        naive += alone.low <= 0.55 <= alone.high
    assert 0.90 <= covered / 200 <= 0.985
    assert naive / 200 < 0.85  # treating completions as independent claims too much


def test_bootstrap_depends_on_the_seed_alone() -> None:
    wins, prompts = [1, 0, 0.5, 1, 0, 1, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    assert win_rate(wins, prompts, seed=5) == win_rate(wins, prompts, seed=5)
    assert win_rate(wins, prompts, seed=5) == win_rate(np.array(wins)[::-1], prompts[::-1], seed=5)
    assert bootstrap_mean(np.linspace(0, 1, 50), seed=5) != bootstrap_mean(np.linspace(0, 1, 50), seed=6)


def test_unanimous_prompts_do_not_give_certainty() -> None:
    found = win_rate(np.ones(40), np.repeat(np.arange(20), 2))
    assert found.value == 1.0
    assert found.low == pytest.approx(wilson(20, 20).low)
    assert math.isnan(win_rate([], []).value)


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    found = bootstrap_mean([1.0, 2.0], [7, 7])
    assert found.value == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert str(found) == "1.500 (no interval)"
    assert str(win_rate([1.0, 0.0], [7, 7])) == str(wilson(0.5, 1))


def test_mismatched_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values, but 2 prompt numbers"):
        bootstrap_mean([1.0, 2.0, 3.0], [0, 1])


def test_pair_accuracy_by_hand() -> None:
    margins = [2.0, -1.0, 0.0, 3.0, -2.0]
    labels = [1.0, 1.0, 0.0, 0.5, 0.0]  # right, wrong, undecided by the scores, tied by people, right
    assert pair_accuracy(margins, labels, [0, 1, 2, 3, 4]).value == pytest.approx(2.5 / 4)


def test_calibration_error_by_hand() -> None:
    # bin [.8, .9): stated .8, seen .5, three pairs of ten; bin [.2, .3): stated .25, seen .25
    stated = [0.8] * 4 + [0.25] * 4
    seen = [1, 1, 0, 0, 1, 0, 0, 0]
    assert expected_calibration_error(stated, seen) == pytest.approx(0.5 * 0.3)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0
    # bins of .85 and .95 do not cancel each other out
    assert expected_calibration_error([0.85, 0.95], [0, 1]) == pytest.approx((0.85 + 0.05) / 2)
    assert math.isnan(expected_calibration_error([], []))


def test_calibration_error_of_a_calibrated_model_vanishes() -> None:
    rng = np.random.default_rng(0)
    stated = rng.random(200_000)
    assert expected_calibration_error(stated, rng.random(200_000) < stated) < 0.005


def test_distinct_n_by_hand() -> None:
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab ab
    assert distinct_n(["a b c"], 1) == 1.0
    assert math.isnan(distinct_n(["one", ""], 2))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3)), min_size=1, max_size=7),
    st.integers(1, 7),
)
def test_best_of_n_is_the_mean_over_all_subsets(samples: list[tuple[int, float]], n: int) -> None:
    n = min(n, len(samples))
    best = []
    for subset in itertools.combinations(samples, n):
        top = max(score for score, _ in subset)
        best.append(np.mean([value for score, value in subset if score == top]))
    found = best_of_n_expectation([score for score, _ in samples], [value for _, value in samples], n)
    assert found == pytest.approx(np.mean(best), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "kl", "maximum"),
    [
        (2, 0.1931, 0.5642),
        (4, 0.6363, 1.0294),
        (8, 1.2044, 1.4237),
        (16, 1.8351, 1.7661),
        (64, 3.1745, 2.3439),
        (256, 4.5491, 2.8272),
        (1000, 5.9088, 3.2419),
    ],
)
def test_best_of_n_published(n: int, kl: float, maximum: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-5)
    count = 40_001  # normal quantiles stand for a large sample, whose expected maximum is tabulated
    sample = stats.norm.ppf((np.arange(count) + 0.5) / count)
    assert best_of_n_expectation(sample, sample, n) == pytest.approx(maximum, abs=2e-3)


def test_best_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="best of 3 needs at least 3 samples, there are 2"):
        best_of_n_expectation([1, 2], [1, 2], 3)


def test_estimate_reads_well() -> None:
    assert str(Estimate(0.61, 0.5512, 0.6649)) == "0.610 (0.551 to 0.665)"


def test_statistics_need_no_torch() -> None:
    code = "import sys, rlhf.statistics; print({'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("agreement", "accuracy"), [(0.726, 0.836), (0.773, 0.869), (0.63, 0.755), (1, 1), (0.4, 0.5)])
def test_ceiling_is_the_accuracy_of_two_judges_who_agree_that_often(agreement: float, accuracy: float) -> None:
    found = ceiling(agreement)
    assert found == pytest.approx(accuracy, abs=5e-4)
    if agreement >= 0.5:
        assert found**2 + (1 - found) ** 2 == pytest.approx(agreement, abs=1e-12)

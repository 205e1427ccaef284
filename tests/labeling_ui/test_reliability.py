"""Coefficients against published worked examples, independent libraries and brute force."""

from __future__ import annotations

import math
from itertools import permutations, product

import krippendorff
import numpy as np
import pytest
from scipy import stats

from labeling_ui.reliability import alpha, coincidences, gwet, kendall_tau, kendall_w, midranks, w_significance

_ = math.nan
FOUR_OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)
"""Krippendorff (2011), section C: four observers, twelve units, missing data."""


def counted(table: np.ndarray, categories: int) -> np.ndarray:
    return np.stack([(table == value).sum(0) for value in range(1, categories + 1)], axis=1)


def test_alpha_of_krippendorffs_own_example() -> None:
    matrix = coincidences(counted(FOUR_OBSERVERS, 5)).sum(0)
    assert matrix[:4, :4] == pytest.approx(
        np.array(
            [[7, 4 / 3, 1 / 3, 1 / 3], [4 / 3, 10, 4 / 3, 1 / 3], [1 / 3, 4 / 3, 8, 1 / 3], [1 / 3, 1 / 3, 1 / 3, 4]]
        )
    )  # as printed in the paper
    assert matrix.sum() == pytest.approx(40)
    assert float(alpha(matrix, "nominal")) == pytest.approx(0.743, abs=5e-4)
    assert float(alpha(matrix, "ordinal")) == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
@pytest.mark.parametrize("seed", range(8))
def test_alpha_is_that_of_the_library(level: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(1, 6, (4, 30)).astype(float)
    table[1] = np.where(rng.random(30) < 0.6, table[0], table[1])
    table[rng.random(table.shape) < 0.3] = math.nan
    expected = krippendorff.alpha(table, level_of_measurement=level)
    assert float(alpha(coincidences(counted(table, 5)).sum(0), level)) == pytest.approx(expected, abs=1e-9)  # pyright: ignore


def test_alpha_of_one_category_is_unknown() -> None:
    assert np.isnan(alpha(coincidences([[3, 0], [2, 0]]).sum(0), "nominal"))


@pytest.mark.parametrize("seed", range(8))
def test_tau_b_is_scipys(seed: int) -> None:
    one, other = np.random.default_rng(seed).integers(1, 4, (2, 6)).tolist()
    assert kendall_tau(one, other) == pytest.approx(float(stats.kendalltau(one, other).statistic), abs=1e-9)
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))


def test_midranks_are_scipys() -> None:
    table = np.random.default_rng(0).integers(1, 4, (5, 3, 6))
    assert midranks(table) == pytest.approx(stats.rankdata(table, axis=-1), abs=0)


@pytest.mark.parametrize("highest", [3, 20])
def test_w_is_friedmans_chi_square_over_m_times_n_less_one(highest: int) -> None:
    for seed in range(8):
        table = np.random.default_rng(seed).integers(1, highest, (4, 6))
        chi_square = stats.friedmanchisquare(*table.T).statistic
        assert float(kendall_w(table)) == pytest.approx(chi_square / (4 * 5), abs=1e-9)


def test_w_is_the_mean_spearman_of_all_pairs() -> None:
    table = np.random.default_rng(1).permuted(np.tile(np.arange(5), (4, 1)), axis=1)
    pairs = [stats.spearmanr(table[i], table[j]).statistic for i in range(4) for j in range(i)]
    assert (4 * float(kendall_w(table)) - 1) / 3 == pytest.approx(np.mean(pairs), abs=1e-9)
    assert float(kendall_w([[1, 2, 3]] * 3)) == 1
    assert np.isnan(kendall_w([[1, 1], [2, 2]]))


def test_significance_of_w_is_that_of_all_permutations() -> None:
    table = [[1, 2, 3], [1, 3, 2], [1, 2, 3]]
    orders = list(permutations((1, 2, 3)))
    seen = float(kendall_w(table))
    exact = np.mean([float(kendall_w(each)) >= seen - 1e-9 for each in product(orders, repeat=3)])
    found = w_significance([table], permutations=4000)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))
    assert w_significance([]) is None
    assert w_significance([[[1, 1], [1, 1]]]) is None


def test_gwet_of_krippendorffs_example() -> None:
    """AC1 of these data as irrCAC publishes it (data set raw4raters): 0.81818 seen, 0.19032 by chance."""
    assert gwet(counted(FOUR_OBSERVERS, 5)) == pytest.approx(0.77544, abs=5e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_gwet_by_going_through_all_pairs(power: int) -> None:
    table = FOUR_OBSERVERS

    def weight(a: float, b: float) -> float:
        return 1 - (abs(a - b) / 4) ** power

    seen, shares = [], []
    for unit in table.T:
        said = unit[~np.isnan(unit)]
        shares.append([np.mean(said == value) for value in range(1, 6)])
        if len(said) > 1:
            seen.append(
                np.mean([weight(said[i], said[j]) for i in range(len(said)) for j in range(len(said)) if i != j])
            )
    prevalence = np.mean(shares, axis=0)
    total = sum(weight(a, b) for a in range(5) for b in range(5))
    chance = total / 20 * sum(p * (1 - p) for p in prevalence)
    expected = (np.mean(seen) - chance) / (1 - chance)
    name = {1: "linear", 2: "quadratic"}[power]
    assert gwet(counted(table, 5), name) == pytest.approx(expected, abs=1e-12)  # pyright: ignore


def test_gwet_stays_high_where_one_category_prevails() -> None:
    """48 of 50 items without a flag by both, two with it by one: alpha says no agreement, AC1 says 0.96."""
    units = [[2, 0]] * 48 + [[1, 1]] * 2
    assert float(alpha(coincidences(units).sum(0), "nominal")) < 0
    chance = 2 * 0.98 * 0.02
    assert gwet(units) == pytest.approx((0.96 - chance) / (1 - chance), abs=1e-12)
    assert math.isnan(gwet([[1, 0], [0, 1]]))

"""Estimates with their uncertainty: win rates, means, best-of-n. Pure functions of numbers and texts.

Completions of one prompt are not independent, so intervals resample prompts, not completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, whose ends are NaN where nothing can be said of it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f} (no interval)"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def wilson(wins: float, n: int, level: float = 0.95) -> Estimate:
    """A share of independent trials with Wilson's interval; half wins (ties) are allowed. NaN where n is 0."""
    if n == 0:
        return Estimate(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = wins / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(centre - half_width, 0.0), min(centre + half_width, 1.0))


def outcomes(first: ArrayLike, second: ArrayLike) -> Floats:
    """1 where `first` has the higher score, 0 where `second` has, 0.5 where they tie."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return (np.sign(difference) + 1) / 2


def win_rate(wins: ArrayLike, prompts: ArrayLike, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Share of comparisons won, ties as half, with a 95 % interval from a bootstrap over prompts.

    `wins[i]` is 1, 0.5 or 0 and belongs to prompt number `prompts[i]`. Where all prompts agree, or there is but one, a
    bootstrap has no spread at all; Wilson's interval over the prompts takes its place.
    """
    estimate = bootstrap_mean(wins, prompts, seed=seed, resamples=resamples)
    if estimate.low < estimate.high or math.isnan(estimate.value):
        return estimate
    count = len(np.unique(np.asarray(prompts)))
    return wilson(estimate.value * count, count)


def bootstrap_mean(
    values: ArrayLike, prompts: ArrayLike | None = None, *, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """The mean of all values with a 95 % percentile interval; whole prompts are resampled together.

    Without `prompts` every value stands for itself. NaN where there are no values, and for the ends of the interval of
    a single prompt: from one alone there is nothing to resample.
    """
    flat = np.asarray(values, dtype=float).ravel()
    if flat.size == 0:
        return Estimate(math.nan, math.nan, math.nan)
    groups = np.arange(flat.size) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1].ravel()
    if groups.size != flat.size:
        raise ValueError(f"{flat.size} values, but {groups.size} prompt numbers")
    sums, counts = np.bincount(groups, flat), np.bincount(groups)
    if len(sums) == 1:
        return Estimate(float(flat.mean()), math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(resamples))
    means = [sums[drawn].sum() / counts[drawn].sum() for drawn in draws]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(flat.mean()), float(low), float(high))


def pair_accuracy(
    margins: ArrayLike, labels: ArrayLike, prompts: ArrayLike, *, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Share of pairs that the scores order as people did; equal scores count half, pairs that people tied are left out.

    `margins` is score(first) - score(second), `labels` is 1, 0.5 or 0 as in `Comparison.outcome`.
    """
    margins, labels, prompts = np.asarray(margins, dtype=float), np.asarray(labels, dtype=float), np.asarray(prompts)
    decided = labels != 0.5
    right = (np.sign(margins * (labels - 0.5)) + 1) / 2
    return win_rate(right[decided], prompts[decided], seed=seed, resamples=resamples)


def ceiling(agreement: float) -> float:
    """Accuracy of a perfect model on single judgements: the q >= 1/2 with q^2 + (1 - q)^2 = agreement.

    Where annotators agree less often than chance would have it, no model does better than chance: 1/2.
    """
    return (1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Mean gap between stated probability and observed share, over `bins` bins of equal width, weighted by size."""
    stated, seen = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    which = np.minimum((stated * bins).astype(int), bins - 1)
    gaps = np.bincount(which, stated - seen, minlength=bins)  # already size of the bin times its gap
    return float(np.abs(gaps).sum() / len(stated)) if len(stated) else math.nan


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Unique over all n-grams of whitespace-separated words in the whole set; NaN where there are none."""
    words = (text.split() for text in texts)
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def best_of_n_expectation(scores: ArrayLike, values: ArrayLike, n: int) -> float:
    """Expected `value` of the best of n by `scores`, over all ways to draw n of the N given without replacement.

    The unbiased estimator of WebGPT, appendix I: sum over i of C(i - 1, n - 1) / C(N, n) * value_(i), sorted by score.
    Equal scores are drawn with equal chance. Raises ValueError unless 1 <= n <= N.
    """
    scores, values = np.asarray(scores, dtype=float), np.asarray(values, dtype=float)
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} needs at least {n} samples, there are {total}")
    # from the top down: C(i-1, n-1) = C(i, n-1) * (i - n + 1) / i, and C(N-1, n-1) / C(N, n) = n / N
    below = np.arange(total - 1, 0, -1)
    weights = n / total * np.cumprod(np.append(1.0, np.maximum(below - n + 1, 0) / below))[::-1]
    _, level, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    level_weights = np.add.reduceat(weights, ends - sizes)  # chance that the best lies on this level
    return float((level_weights / sizes)[level] @ values)


def best_of_n_kl(n: int) -> float:
    """KL in nats from the policy to its best-of-n: ln n - (n - 1) / n, an upper bound where scores tie."""
    return math.log(n) - (n - 1) / n

"""Numbers with 95 % intervals from a bootstrap over prompts: what is said of one prompt is not independent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from rlhf.statistics import wilson

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """A number with its 95 % interval; None where there was nothing to count. `pairs`: how many things were counted."""

    value: float | None
    low: float | None
    high: float | None
    pairs: int


NOTHING = Rate(None, None, None, 0)


def draw(prompts: int, bootstrap: int, seed: int) -> Floats:
    """(bootstrap, prompts): how often each prompt is drawn, each time as many as there are."""
    rng = np.random.default_rng(seed)
    if not prompts:
        return np.zeros((bootstrap, 0))
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=bootstrap).astype(float)


def estimate(
    parts: ArrayLike,
    statistic: Callable[[Floats], Floats],
    draws: Floats,
    *,
    pairs: float,
    least: float = 0.0,
    most: float = 1.0,
) -> Rate:
    """`statistic` of the sum over prompts of `parts` (prompts, ...), with its interval.

    `draws` comes from `draw` for these prompts; `statistic` takes (..., parts) and gives NaN where nothing was counted.
    The percentiles are Hesterberg's (2015): widened as Student's t would have it, so that few prompts cover, too. Where
    all draws agree, Wilson's interval over the prompts takes their place, on the scale from `least` to `most`.
    """
    values = np.asarray(parts, dtype=float)
    there = sum(bool(part.any()) for part in values)
    value = float(statistic(values.sum(0))) if there else math.nan
    if math.isnan(value):
        return NOTHING
    found = statistic(np.tensordot(draws, values, axes=1))
    found = found[np.isfinite(found)]
    if there > 1 and found.size and np.ptp(found) > 1e-12:
        tail = norm.cdf(math.sqrt(there / (there - 1)) * t.ppf(0.025, there - 1))
        low, high = np.quantile(found, [tail, 1 - tail])
    else:
        share = wilson((value - least) / (most - least) * there, there)
        low, high = least + share.low * (most - least), least + share.high * (most - least)
    return Rate(value, float(low), float(high), round(pairs))


def ratio(sums: Floats) -> Floats:
    """(..., 2) credit and count -> credit / count; NaN where the count is 0."""
    count = sums[..., 1]
    return np.where(count > 0, sums[..., 0] / np.where(count > 0, count, 1.0), math.nan)

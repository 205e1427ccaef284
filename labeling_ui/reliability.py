"""Agreement beyond pairs: Kendall's tau-b and W, Krippendorff's alpha, Gwet's AC2. Plain arrays in, numbers out.

Definitions: Krippendorff (2011), "Computing Krippendorff's alpha-reliability"; Kendall and Gibbons (1990), chapter 6;
Gwet (2014), "Handbook of inter-rater reliability", chapters 2 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Level = Literal["nominal", "ordinal"]
Weights = Literal["identity", "linear", "quadratic"]


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """tau-b = (C - D) / sqrt((n0 - n1)(n0 - n2)); NaN where either says that all are equal."""
    one = [np.sign(a - b) for a, b in combinations(first, 2)]
    other = [np.sign(a - b) for a, b in combinations(second, 2)]
    untied = math.sqrt(np.count_nonzero(one) * np.count_nonzero(other))
    return float(np.dot(one, other)) / untied if untied else math.nan


def midranks(ranks: ArrayLike) -> Floats:
    """(..., n): ranks 1 to n of the last axis, tied ones sharing the mean of their places."""
    values = np.asarray(ranks, dtype=float)
    below = (values[..., :, None] > values[..., None, :]).sum(-1)
    equal = (values[..., :, None] == values[..., None, :]).sum(-1)
    return below + (equal + 1) / 2


def kendall_w(ranks: ArrayLike) -> Floats:
    """W of m rankings of the same n things, (..., m, n) -> (...), corrected for ties; NaN where all are one tie.

    W = 12 S / (m^2 (n^3 - n) - m sum over raters and ties of (t^3 - t)), S the spread of the rank sums.
    """
    places = midranks(ranks)
    m, n = places.shape[-2:]
    sums = places.sum(-2)
    spread = ((sums - sums.mean(-1, keepdims=True)) ** 2).sum(-1)
    values = np.asarray(ranks, dtype=float)
    sizes = (values[..., :, None] == values[..., None, :]).sum(-1)  # each tie of t counts t times: sum (t^2 - 1)
    room = m**2 * (n**3 - n) - m * (sizes**2 - 1.0).sum((-2, -1))
    return np.where(room > 0, 12 * spread / np.where(room > 0, room, 1.0), math.nan)


def w_significance(items: Sequence[ArrayLike], *, permutations: int = 1000, seed: int = 0) -> float | None:
    """Chance of a mean W as large where every rater orders each item at random; None where no item has an order.

    `items` holds (m, n) ranks each. Ties stay as many as they are: each rater's own ranks are shuffled.
    """
    rng = np.random.default_rng(seed)
    shaped = [np.asarray(item, dtype=float) for item in items]
    groups = [np.stack([item for item in shaped if item.shape == shape]) for shape in sorted({i.shape for i in shaped})]
    if not any(np.isfinite(kendall_w(group)).any() for group in groups):
        return None
    seen = _sum_of_w(groups)
    chance = [_sum_of_w([rng.permuted(group, axis=-1) for group in groups]) for _ in range(permutations)]
    return (1 + sum(value >= seen - 1e-9 for value in chance)) / (1 + permutations)


def _sum_of_w(groups: Sequence[Floats]) -> float:
    return float(sum(np.nansum(kendall_w(group)) for group in groups))


def coincidences(units: ArrayLike) -> Floats:
    """(units, C) counts of each category in each unit -> (units, C, C): pairs of values within a unit, over m_u - 1.

    Units with fewer than two values hold no pair: 0.
    """
    counts = np.asarray(units, dtype=float)
    size = counts.sum(-1)[:, None, None]
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    return np.where(size > 1, pairs / np.where(size > 1, size - 1, 1.0), 0.0)


def alpha(coincidence: ArrayLike, level: Level) -> Floats:
    """Krippendorff's alpha = 1 - D_o / D_e from coincidence matrices (..., C, C), categories in order.

    NaN where fewer than two categories occur: nothing could have differed.
    """
    observed = np.asarray(coincidence, dtype=float)
    margins = observed.sum(-1)
    total = margins.sum(-1)
    distance = _distance(margins, level)
    disagreement = (observed * distance).sum((-2, -1))
    expected = (margins[..., :, None] * margins[..., None, :] * distance).sum((-2, -1))
    ratio = (total - 1) * disagreement / np.where(expected > 0, expected, 1.0)
    return np.where(expected > 0, 1 - ratio, math.nan)


def _distance(margins: Floats, level: Level) -> Floats:
    """Squared distance of categories c and k; ordinal: (sum of the margins from c to k, less half of both ends)^2."""
    if level == "nominal":
        return np.broadcast_to(1 - np.eye(margins.shape[-1]), (*margins.shape, margins.shape[-1]))
    middle = np.cumsum(margins, axis=-1) - margins / 2
    return (middle[..., :, None] - middle[..., None, :]) ** 2


def gwet(units: ArrayLike, weights: Weights = "identity") -> float:
    """Gwet's AC1 (identity) or AC2 of (units, C) counts, categories in order; NaN where no unit has two values.

    Agreement by chance is T_w sum pi (1 - pi) / (C (C - 1)), which stays small where one category prevails.
    """
    return float(gwet_of_parts(gwet_parts(units, weights), weights))


def gwet_parts(units: ArrayLike, weights: Weights) -> Floats:
    """(units, C) counts -> (C + 2): what the coefficient is made of, as sums that can be added over sets of units.

    Weighted agreement within units and how many units that is of; then each category's share, summed over rated units.
    """
    counts = np.asarray(units, dtype=float)
    size = counts.sum(1)
    shared, rated = counts[size > 1], counts[size > 0]
    pairs = shared.sum(1) * (shared.sum(1) - 1)
    agreed = (shared * (shared @ _weight(counts.shape[1], weights) - 1)).sum(1) / pairs
    return np.array([agreed.sum(), len(shared), *(rated / rated.sum(1, keepdims=True)).sum(0)])


def gwet_of_parts(parts: ArrayLike, weights: Weights) -> Floats:
    """The coefficient from (..., C + 2) sums of `gwet_parts`."""
    sums = np.asarray(parts, dtype=float)
    shared, shares = sums[..., 1], sums[..., 2:]
    categories = shares.shape[-1]
    rated = shares.sum(-1)
    prevalence = shares / np.where(rated > 0, rated, 1.0)[..., None]
    spread = (prevalence * (1 - prevalence)).sum(-1) / (categories * (categories - 1))
    chance = _weight(categories, weights).sum() * spread
    seen = sums[..., 0] / np.where(shared > 0, shared, 1.0)
    return np.where(shared > 0, (seen - chance) / (1 - chance), math.nan)


def _weight(categories: int, weights: Weights) -> Floats:
    gap = np.abs(np.subtract.outer(np.arange(categories), np.arange(categories))) / (categories - 1)
    return {"identity": (gap == 0).astype(float), "linear": 1 - gap, "quadratic": 1 - gap**2}[weights]

"""Who ranks how well: the annotators' reliability and sway, and what their rankings say of the completions together.

The model is that of `labeling_ui.likelihood`. Its parameters have priors, so that an annotator of whom little is known
is taken to be like the others; standard errors are those of the integrated likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from labeling_ui.agreement import ranked_together
from labeling_ui.choices import Floats, Numbered, number, ranks_by_text
from labeling_ui.intervals import Rate
from labeling_ui.likelihood import SHARPNESS, SWAY, TIES, Marginal, Points, marginal, settle
from rlhf.data import prompt_key
from rlhf.soft_labels import SoftLabel, write_soft_labels
from rlhf.types import Ranking

POOL_MEAN, POOL_SPREAD = 1.5, 2.0
"""What is known of the mean sharpness of all annotators before they say anything, in logits per standard deviation."""
CENTRE = (math.nan, 0.0, -1.5)
SPREAD = (1.5, 1.0, 1.5)
"""Prior mean and deviation of one annotator's sharpness (about the pool's mean), sway and log tie strength."""
GOLD = "\0gold"
GOLD_PARAMETERS = (6.0, 0.0, -3.0)
"""Known answers come from an annotator who is hardly ever wrong."""
STEP = 1e-4
PRECISION = (3e-2, 1e-2, 1e-3)
"""Of the gradient, in roots of the number of rankings: first roughly, then well below the standard error."""
_GAPS = np.linspace(0, 10, 2001)
_GAP_WEIGHTS = np.exp(-(_GAPS**2) / 4) / np.exp(-(_GAPS**2) / 4).sum()
"""The distance of two standard normal qualities."""


@dataclass(frozen=True)
class RaterFit:
    """One annotator. Intervals are 95 %; `Rate.pairs` counts the pairs of completions that bear on the number."""

    name: str
    reliability: Rate
    """Chance to put two completions of a prompt in the right order, places and ties aside: 1/2 is guessing, less is
    the wrong way round. Its pairs are those of prompts that somebody else has ranked, too."""
    position_bias: Rate
    """Logits that a place further up is worth; above 0 the annotator likes what stands first."""
    sharpness: float
    """beta: logits per standard deviation of the quality."""
    ties: float
    """Share of ties that they would make between equals."""


@dataclass(frozen=True)
class RaterModel:
    """All annotators by name, the typical one's sharpness, and labels of every pair of completions shown together."""

    raters: tuple[RaterFit, ...]
    sharpness: float
    labels: tuple[SoftLabel, ...]
    """The likelier one first, by how the typical annotator would judge without sway of place."""

    def rater(self, name: str) -> RaterFit | None:
        """The one of that name, if they have ranked anything."""
        return next((each for each in self.raters if each.name == name), None)


def fit_raters(rankings: Sequence[Ranking], *, gold: Sequence[tuple[Ranking, Ranking]] = ()) -> RaterModel:
    """The most likely annotators for these rankings, and the labels that follow.

    `gold`: (what an annotator said, the known answer). It tells who is reliable, and gets no labels. An annotator's
    repeats may be among the rankings. Takes seconds for a thousand of them.
    """
    said = [*rankings, *(one for one, _ in gold)]
    names = sorted({ranking.annotator for ranking in said})
    answers = {(prompt_key(each.prompt), each.completions): replace(each, annotator=GOLD) for _, each in gold}
    numbered = number([*said, *answers.values()], [*names, GOLD])
    if not numbered.prompts:
        return RaterModel((), POOL_MEAN, ())
    posterior = _Posterior(numbered, len(names))
    best = posterior.start()
    for precision in PRECISION:  # the points are moved to where the annotators found so far would have them
        posterior.settle(best)
        options = {"gtol": precision * math.sqrt(len(rankings))}
        best = minimize(posterior, best, jac=True, method="BFGS", options=options).x
    errors, found = posterior.errors(best), posterior.at(best)
    parameters = posterior.parameters(best)[:-1]
    raters = _fits(names, parameters, errors, numbered)
    sharpness = _typical(parameters[:, SHARPNESS], numbered.pairs[:, :-1].sum(0))
    return RaterModel(raters, sharpness, tuple(_labels(rankings, numbered, found, sharpness)))


def write_labels(path: Path, rankings: Sequence[Ranking], *, gold: Sequence[tuple[Ranking, Ranking]] = ()) -> bool:
    """Write the soft labels of `rankings`; returns whether there are any.

    Where no two annotators ranked the same item, nothing is known of who is reliable: an old file is removed.
    """
    if not ranked_together(rankings):
        path.unlink(missing_ok=True)
        return False
    write_soft_labels(path, fit_raters(rankings, gold=gold).labels)
    return True


class _Posterior:
    """Negative log posterior of (annotators * 3 parameters, the pool's mean sharpness), qualities integrated out."""

    def __init__(self, numbered: Numbered, annotators: int) -> None:
        self.numbered, self.annotators = numbered, annotators
        self.spread = np.array(SPREAD)
        self.points = Points(np.zeros((0, 1, 1)), np.zeros((0, 1)))

    def settle(self, x: Floats) -> None:
        """Try the qualities where they are likely for these annotators."""
        texts = self.numbered.texts
        self.points = settle(self.parameters(x), self.numbered.choices, len(texts), max(map(len, texts)))

    def start(self) -> Floats:
        """Everybody alike."""
        return np.append(np.tile([1.0, *CENTRE[1:]], self.annotators), 1.0)

    def parameters(self, x: Floats) -> Floats:
        """(annotators + 1, 3): the last row are the known answers."""
        return np.vstack([x[:-1].reshape(-1, 3), GOLD_PARAMETERS])

    def at(self, x: Floats) -> Marginal:
        """Of the rankings."""
        return marginal(self.parameters(x), self.numbered.choices, self.points)

    def __call__(self, x: Floats) -> tuple[float, Floats]:
        """Value and gradient."""
        found, pool = self.at(x), x[-1]
        apart = (x[:-1].reshape(-1, 3) - (pool, *CENTRE[1:])) / self.spread
        pooled = (pool - POOL_MEAN) / POOL_SPREAD
        value = found.value - (apart**2).sum() / 2 - pooled**2 / 2
        gradient = found.gradient[:-1] - apart / self.spread
        toward_pool = apart[:, SHARPNESS].sum() / SPREAD[SHARPNESS] - pooled / POOL_SPREAD
        return -value, -np.append(gradient.ravel(), toward_pool)

    def errors(self, x: Floats) -> Floats:
        """(annotators, 3) standard errors, from the curvature by central differences of the gradient."""
        parameters, size = self.parameters(x), len(x)
        curvature = np.zeros((size, size))
        for rater in range(self.annotators):
            ranked = self.numbered.pairs[:, rater] > 0  # the gradient of other prompts does not change
            groups, points = [group.of(ranked) for group in self.numbered.choices], self.points.of(ranked)
            for column in range(3):
                step = np.zeros_like(parameters)
                step[rater, column] = STEP
                ends = [marginal(parameters + sign * step, groups, points).gradient[:-1] for sign in (1, -1)]
                curvature[rater * 3 + column, :-1] = (ends[1] - ends[0]).ravel() / (2 * STEP)
        np.fill_diagonal(curvature, curvature.diagonal() + np.append(np.tile(self.spread**-2.0, self.annotators), 0.0))
        to_pool = np.arange(self.annotators) * 3 + SHARPNESS
        curvature[to_pool, -1] = curvature[-1, to_pool] = -(SPREAD[SHARPNESS] ** -2.0)
        curvature[-1, -1] = self.annotators * SPREAD[SHARPNESS] ** -2.0 + POOL_SPREAD**-2.0
        covariance = np.linalg.pinv((curvature + curvature.T) / 2, hermitian=True)
        return np.sqrt(np.maximum(np.diag(covariance)[:-1], 0.0)).reshape(-1, 3)


def _fits(names: Sequence[str], parameters: Floats, errors: Floats, numbered: Numbered) -> tuple[RaterFit, ...]:
    pairs = numbered.pairs[:, :-1]
    others = (numbered.pairs > 0).sum(1, keepdims=True) > 1
    shared, everything = (pairs * others).sum(0), pairs.sum(0)
    return tuple(
        RaterFit(
            name=name,
            reliability=_reliability(float(row[SHARPNESS]), float(error[SHARPNESS]), int(count)),
            position_bias=_within(float(row[SWAY]), 1.96 * float(error[SWAY]), int(total)),
            sharpness=float(row[SHARPNESS]),
            ties=float(expit(row[TIES] - math.log(2))),
        )
        for name, row, error, count, total in zip(names, parameters, errors, shared, everything, strict=True)
    )


def _reliability(sharpness: float, error: float, pairs: int) -> Rate:
    """On the scale of chances the likelihood is nearly symmetric, which on that of sharpness it is not."""
    slope = (accuracy(sharpness + STEP) - accuracy(sharpness - STEP)) / (2 * STEP)
    rate = _within(accuracy(sharpness), 1.96 * slope * error, pairs)
    return replace(rate, low=max(rate.low or 0.0, 0.0), high=min(rate.high or 0.0, 1.0))


def _within(value: float, half_width: float, pairs: int) -> Rate:
    return Rate(value, value - half_width, value + half_width, pairs)


def accuracy(sharpness: float) -> float:
    """Chance that the better of two completions with independent N(0, 1) qualities is found: E sigmoid(beta |d|)."""
    return float(_GAP_WEIGHTS @ expit(sharpness * _GAPS))


def _typical(sharpness: Floats, pairs: Floats) -> float:
    """The median annotator's, each counting as much as they ranked; at least 1/2, so that labels are never all even."""
    order = np.argsort(sharpness)
    middle = np.searchsorted(np.cumsum(pairs[order]), pairs.sum() / 2)
    return max(float(sharpness[order][min(middle, len(order) - 1)]), 0.5)


def _labels(rankings: Sequence[Ranking], numbered: Numbered, found: Marginal, sharpness: float) -> list[SoftLabel]:
    """Every two completions that somebody has ranked together, once, the likelier one first."""
    labels: dict[tuple[int, int, int], SoftLabel] = {}
    for ranking in rankings:
        texts = ranks_by_text(ranking)
        if len(texts) < 2:
            continue
        prompt = numbered.prompts[prompt_key(ranking.prompt)]
        for one, other in combinations(sorted(texts, key=numbered.texts[prompt].__getitem__), 2):
            i, j = numbered.texts[prompt][one], numbered.texts[prompt][other]
            if (prompt, i, j) not in labels:
                quality, covariance = found.quality[prompt], found.covariance[prompt]
                gap, spread = quality[i] - quality[j], covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
                chance = _predictive(sharpness * abs(gap), sharpness**2 * spread)
                better, worse = (one, other) if gap >= 0 else (other, one)
                weight = float(np.clip(1 - spread / 2, 0.0, 1.0))
                labels[prompt, i, j] = SoftLabel(ranking.prompt, better, worse, chance, weight)
    return list(labels.values())


def _predictive(mean: float, variance: float) -> float:
    """E sigmoid(d) for d ~ N(mean, variance), by MacKay's approximation."""
    return float(expit(mean / math.sqrt(1 + math.pi * variance / 8)))

"""How likely rankings are, given their annotators alone: the qualities of the completions are integrated out.

The model. Completion i of a prompt has a quality s_i ~ N(0, 1). An annotator with sharpness beta, sway b and tie
strength nu feels a worth v_i = beta s_i - b place_i, and takes the best of what remains with probability

    P(set T is next) = nu^(|T| - 1) exp(mean of v over T) / the same summed over all sets of what remains

(Turner et al. 2020, the Davidson-Luce model). Between two completions that is Bradley-Terry with Davidson's ties; for
rankings without ties it is Plackett-Luce. Pairs taken out of one ranking would not be independent; choices are.

The integral over s is importance sampling from a normal distribution near the posterior of each prompt, at points that
stay where they are while annotators are compared: so the sum is a smooth function of the parameters, and by Fisher's
identity its gradient is the posterior mean of the plain one. (Laplace's approximation is cheaper and fails where it
matters most: for pairs, ranked by the sharp. And the qualities' most likely values together with the annotators' would
be no consistent estimate of either, as there are more qualities than rankings.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import softmax
from scipy.stats import norm
from scipy.stats.qmc import Sobol

from labeling_ui.choices import Choices, Floats

SHARPNESS, SWAY, TIES = range(3)
"""Columns of the parameters (raters, 3): beta, b and log nu."""
POINTS = 64
WIDER = 1.2
"""The points are spread more widely than the posterior by this, so that its tails are seen."""
LONGEST_STEP, MOST_STEPS, CLOSE_ENOUGH = 2.0, 50, 1e-6
LIMIT = 600.0
"""Of a logarithm whose exponential is a number."""


@dataclass(frozen=True)
class Points:
    """Where the qualities of each prompt are tried. `quality` (prompts, texts, points); `log_weight` (prompts, points):
    log of prior over the density that they were drawn from."""

    quality: Floats
    log_weight: Floats

    def of(self, prompts: NDArray[np.bool_]) -> Points:
        """Those of some prompts."""
        return Points(self.quality[prompts], self.log_weight[prompts])


@dataclass(frozen=True)
class Marginal:
    """The log likelihood of all rankings, its gradient (raters, 3), and the posterior of the qualities."""

    value: float
    gradient: Floats
    quality: Floats
    """(prompts, texts): mean; 0, that of the prior, for padding."""
    covariance: Floats
    """(prompts, texts, texts)"""
    effective: Floats
    """(prompts,): how many points the weighted ones are worth."""


def marginal(parameters: Floats, groups: Sequence[Choices], points: Points) -> Marginal:
    """Evaluate at `parameters` (raters, 3)."""
    logs, slopes = points.log_weight.copy(), []
    for group in groups:
        likelihood, slope = _try(parameters, group, points.quality)
        slopes.append(slope)
        logs += _by_prompt(group, len(logs)) @ likelihood
    top = logs.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(logs - top)
    total = weights.sum(axis=1, keepdims=True)
    weights /= total
    gradient = np.zeros_like(parameters)
    for group, slope in zip(groups, slopes, strict=True):
        rows = np.einsum("cnm,nm->nc", slope, weights[group.prompt])
        for column in range(3):
            gradient[:, column] += np.bincount(group.rater, rows[:, column], len(gradient))
    mean = np.einsum("pm,pim->pi", weights, points.quality)
    apart = points.quality - mean[:, :, None]
    covariance = np.einsum("pim,pjm->pij", weights[:, None, :] * apart, apart)
    value = float((top + np.log(total) - np.log(weights.shape[1])).sum())
    return Marginal(value, gradient, mean, covariance, 1 / (weights**2).sum(1))


def _try(parameters: Floats, group: Choices, quality: Floats) -> tuple[Floats, Floats]:
    """Log likelihood (N, M) of every choice at every point, and its derivatives (3, N, M) by the parameters."""
    sharpness, sway, ties = (column[:, None, None] for column in parameters[group.rater].T)
    sets, place = group.sets, group.place[:, :, None]
    shares, extra = sets.shares[group.chosen], sets.extra[group.chosen][:, None]
    here = quality[group.prompt[:, None], group.text]
    worth = sharpness * here - sway * place
    odds = np.exp(np.clip(sets.shares @ worth + ties * sets.extra[:, None], -LIMIT, LIMIT))
    total = odds.sum(axis=1)
    likelihood = (shares[:, :, None] * worth).sum(1) + ties[:, 0] * extra - np.log(total)
    surprise = shares[:, :, None] - sets.shares.T @ odds / total[:, None]
    by_ties = extra - (sets.extra[:, None] * odds).sum(1) / total
    return likelihood, np.stack([(surprise * here).sum(1), -(surprise * place).sum(1), by_ties])


def _by_prompt(group: Choices, prompts: int) -> csr_array:
    """(prompts, N): 1 where a choice is of a prompt."""
    ones = np.ones(len(group.prompt))
    return csr_array((ones, (group.prompt, np.arange(len(ones)))), shape=(prompts, len(ones)))


# --------------------------------------------------------------------------------------------- where to try qualities


def settle(parameters: Floats, groups: Sequence[Choices], prompts: int, texts: int, *, rounds: int = 3) -> Points:
    """Points that suit the posterior at `parameters`: first about its mode, then by their own weighted moments."""
    mean, curved = mode(parameters, groups, np.zeros((prompts, texts)))
    covariance = curved
    for _ in range(rounds):
        points = _spread(mean, covariance)
        found = marginal(parameters, groups, points)
        worth = found.effective[:, None, None]
        mean = found.quality
        covariance = (worth * found.covariance + texts * curved) / (worth + texts)
    return _spread(mean, covariance)


def _spread(mean: Floats, covariance: Floats) -> Points:
    """Quasi-random normal points about `mean`, turned for each prompt so that their errors are independent."""
    prompts, texts = mean.shape
    shifts = np.random.default_rng(0).random((prompts, texts, 1))
    even = Sobol(texts, scramble=True, seed=0).random(POINTS)  # pyright: ignore[reportCallIssue]
    normal = np.clip(norm.ppf((even.T + shifts) % 1), -5, 5)
    root = WIDER * np.linalg.cholesky(covariance)
    quality = mean[:, :, None] + root @ normal
    drawn = -(normal**2).sum(1) / 2 - np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)[:, None]
    return Points(quality, -(quality**2).sum(1) / 2 - drawn)


def mode(parameters: Floats, groups: Sequence[Choices], start: Floats) -> tuple[Floats, Floats]:
    """Newton's method for the most likely qualities; returns them and the inverse of the curvature there."""
    quality = start
    for _ in range(MOST_STEPS):
        slope, curvature = _slope(parameters, groups, quality)
        change = np.linalg.solve(curvature, slope[..., None])[..., 0]
        longest = np.abs(change).max(axis=1, keepdims=True, initial=0.0)
        quality = quality + change * np.minimum(1.0, LONGEST_STEP / np.maximum(longest, CLOSE_ENOUGH))
        if longest.max(initial=0.0) < CLOSE_ENOUGH:
            break
    return quality, np.asarray(np.linalg.inv(_slope(parameters, groups, quality)[1]), dtype=np.float64)


def _slope(parameters: Floats, groups: Sequence[Choices], quality: Floats) -> tuple[Floats, Floats]:
    """Gradient and negative Hessian of the log posterior in the qualities."""
    prompts, texts = quality.shape
    slope = -quality
    curvature = np.broadcast_to(np.eye(texts), (prompts, texts, texts)).copy()
    for group in groups:
        sharpness, sway, ties = (column[:, None] for column in parameters[group.rater].T)
        worth = sharpness * quality[group.prompt[:, None], group.text] - sway * group.place
        odds = softmax(worth @ group.sets.shares.T + ties * group.sets.extra, axis=1)
        mean = odds @ group.sets.shares
        spread = (odds @ group.sets.products).reshape(*mean.shape, mean.shape[1]) - mean[:, :, None] * mean[:, None, :]
        surprise = sharpness * (group.sets.shares[group.chosen] - mean)
        flat = group.prompt[:, None] * texts + group.text
        slope += np.bincount(flat.ravel(), surprise.ravel(), slope.size).reshape(slope.shape)
        square = flat[:, :, None] * texts + group.text[:, None, :]
        weights = sharpness[:, :, None] ** 2 * spread
        curvature += np.bincount(square.ravel(), weights.ravel(), curvature.size).reshape(curvature.shape)
    return slope, curvature

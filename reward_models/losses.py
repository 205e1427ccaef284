"""Pure losses on the scores of ranked completions. Imports only torch.

Shapes: B rankings, K places (rankings with fewer completions are padded). `ranks` (B, K): 1 is best, equal numbers are
ties, 0 is "takes no part": not ranked, or padding. Scores in such places are never read, whatever they are. Every loss
is one number per ranking (B,); the caller sums and divides once, by the rankings of the whole optimiser batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def plackett_luce_loss(
    scores: Float[Tensor, "B K"], ranks: Int[Tensor, "B K"], *, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """Negative log likelihood of the rankings under Plackett-Luce, ties left unbroken.

    Each completion i that has someone ranked strictly below it contributes

        -log P(i before all below it) = logsumexp({s_i} and {s_j : rank_j > rank_i}) - s_i

    so that tie-mates meet the same rivals and never each other. Without ties this is the Plackett-Luce likelihood, for
    K = 2 Bradley-Terry. With ties it is a composite likelihood: every factor is the exact Plackett-Luce probability of
    that event, the events of tie-mates being taken as independent. It depends on no order within a tie, and a ranking
    that is one tie says nothing (loss 0). A top-m list whose rest is known to be worse is the rest tied at the bottom.
    `label_smoothing` is the share of rankings taken to be reversed.
    """
    forward = _plackett_luce(scores, ranks)
    if not label_smoothing:
        return forward
    reverse = _plackett_luce(scores, torch.where(ranks > 0, ranks.max() + 1 - ranks, ranks))
    return (1 - label_smoothing) * forward + label_smoothing * reverse


def _plackett_luce(scores: Float[Tensor, "B K"], ranks: Int[Tensor, "B K"]) -> Float[Tensor, " B"]:
    scores = _ranked_only(scores, ranks)
    rivals = torch.where(beats(ranks), scores[:, None, :], -torch.inf)
    with_self = torch.cat([scores[:, :, None], rivals], dim=2)  # alone where nobody is below: a contribution of 0
    return (with_self.logsumexp(dim=2) - scores).sum(dim=1)


def bradley_terry_loss(
    scores: Float[Tensor, "B K"],
    ranks: Int[Tensor, "B K"],
    *,
    tie_strength: float | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """Mean negative log likelihood over all pairs of a ranking, each pair once (Ouyang et al. 2022), ties included.

    With `tie_strength` nu: Davidson's (1970) model, D = e^(d/2) + e^(-d/2) + nu with d = s_i - s_j,

        P(i > j) = e^(d/2) / D        P(i = j) = nu / D

    where nu / (2 + nu) is the share of ties among equals; nu near 0 is plain Bradley-Terry. Without it, a tie is the
    soft label one half: 1/2 (-log sigmoid(d) - log sigmoid(-d)). `label_smoothing` is the share of strict judgements
    taken to be reversed. A ranking with fewer than two ranked completions has loss 0.
    """
    scores = _ranked_only(scores, ranks)
    margin = scores[:, :, None] - scores[:, None, :]
    wins, losses = -_log_win(margin, tie_strength), -_log_win(-margin, tie_strength)
    strict = (1 - label_smoothing) * wins + label_smoothing * losses
    tie = (wins + losses) / 2 if tie_strength is None else -_log_tie(margin, tie_strength)
    ordered, tied = beats(ranks), _ties(ranks)
    total = (torch.where(ordered, strict, 0.0) + torch.where(tied, tie, 0.0)).sum(dim=(1, 2))
    return total / (ordered | tied).sum(dim=(1, 2)).clamp(min=1)


def _log_win(margin: Float[Tensor, "B K K"], tie_strength: float | None) -> Float[Tensor, "B K K"]:
    if tie_strength is None:
        return F.logsigmoid(margin)
    return margin / 2 - _log_davidson(margin, tie_strength)


def _log_tie(margin: Float[Tensor, "B K K"], tie_strength: float) -> Float[Tensor, "B K K"]:
    return math.log(tie_strength) - _log_davidson(margin, tie_strength)


def _log_davidson(margin: Float[Tensor, "B K K"], tie_strength: float) -> Float[Tensor, "B K K"]:
    """log(e^(d/2) + e^(-d/2) + nu)."""
    log_nu = torch.full_like(margin, math.log(tie_strength))
    return torch.stack([margin / 2, -margin / 2, log_nu]).logsumexp(dim=0)


def soft_pair_loss(
    scores: Float[Tensor, "B K"], probability: Float[Tensor, "B K K"], weight: Float[Tensor, "B K K"]
) -> Float[Tensor, " B"]:
    """Soft cross-entropy of sigmoid(s_i - s_j) with P(i beats j), weighted, and meant over a prompt's labelled pairs:

        -weight (p log sigmoid(d) + (1 - p) log sigmoid(-d))

    Each pair stands once, as [i, j] or [j, i]; weight 0 is "no label", and its scores are never read. The mean is over
    how many there are, not over their weights: prompts of which little is known weigh less.
    """
    labelled = weight > 0
    margin = torch.where(labelled, scores[:, :, None] - scores[:, None, :], 0.0)
    entropy = -probability * F.logsigmoid(margin) - (1 - probability) * F.logsigmoid(-margin)
    total = torch.where(labelled, weight * entropy, 0.0).sum(dim=(1, 2))
    return total / labelled.sum(dim=(1, 2)).clamp(min=1)


def centering_loss(scores: Float[Tensor, "B K"], ranks: Int[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Squared double mean of a ranking's scores: (s_1 + s_2)^2 for a pair (Eisenstein et al. 2023, eq. 2).

    No loss of differences knows where zero is; this one puts it there. It does not touch the spread.
    """
    count = (ranks > 0).sum(dim=1).clamp(min=1)
    return (2 * _ranked_only(scores, ranks).sum(dim=1) / count) ** 2


def _ranked_only(scores: Float[Tensor, "B K"], ranks: Int[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Scores with 0 in the places that take no part; this also removes NaN and its gradient."""
    return torch.where(ranks > 0, scores, 0.0)


def beats(ranks: Int[Tensor, "B K"]) -> Bool[Tensor, "B K K"]:
    """[b, i, j]: i stands strictly above j."""
    mine, theirs = ranks[:, :, None], ranks[:, None, :]
    return (mine > 0) & (mine < theirs)


def _ties(ranks: Int[Tensor, "B K"]) -> Bool[Tensor, "B K K"]:
    """[b, i, j]: i and j share a rank; each pair once (i < j)."""
    mine, theirs = ranks[:, :, None], ranks[:, None, :]
    return ((mine > 0) & (mine == theirs)).triu(diagonal=1)

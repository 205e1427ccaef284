"""What can be computed instead of sampled, where every completion can be listed.

PPO maximises J(pi) = E[score] - beta KL(pi || ref). Its optimum is known in closed form,

    pi*(y) = ref(y) exp(score(y) / beta) / Z,    J* = beta log Z,    J* - J(pi) = beta KL(pi || pi*),

so the distance between a trained policy and the best one is a number, not an impression. Shapes: N completions (all
that exist), T tokens. Everything here is fp64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf import ops
from rlhf.actor_critic import TokenModel
from rlhf.rollout import measure, partition
from rlhf.sequences import Sequences

EOS = 0
"""The token that ends a completion, in every world here."""


@dataclass(frozen=True)
class World:
    """Every completion of the one prompt, with its score and its logprobs under the reference."""

    sequences: Sequences
    scores: Tensor
    """(N,)"""
    ref_logprobs: Tensor
    """(N, T)"""

    @property
    def reference(self) -> Tensor:
        """(N,) log ref(y)."""
        return self.ref_logprobs.sum(1)

    def optimum(self, beta: float) -> Tensor:
        """(N,) log pi*(y)."""
        return (self.reference + self.scores / beta).log_softmax(0)

    def value_of_optimum(self, beta: float) -> float:
        """J* = beta log Z."""
        return beta * float((self.reference + self.scores / beta).logsumexp(0))


@dataclass(frozen=True)
class Outcome:
    """Exact expectations under a policy."""

    objective: float
    """J = score - beta * kl."""
    score: float
    kl: float
    """KL(policy || reference) in nats."""
    length: float
    """Tokens, EOS included."""
    finished: float
    """Probability of a completion that ends by itself."""


def prefixes(vocabulary: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Everything that a policy may have to continue, breadth first, so that the children of a prefix are neighbours."""
    level, found = [()], []
    for _ in range(max_tokens):
        found += level
        level = [(*prefix, token) for prefix in level for token in range(vocabulary) if token != EOS]
    return found


def completions(vocabulary: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Every completion: each prefix may end, and the longest may go on until the limit cuts them."""
    found = prefixes(vocabulary, max_tokens)
    longest = [prefix for prefix in found if len(prefix) == max_tokens - 1]
    cut = [(*prefix, token) for prefix in longest for token in range(vocabulary) if token != EOS]
    return [(*prefix, EOS) for prefix in found] + cut


def all_sequences(vocabulary: int, max_tokens: int, *, prompt: Sequence[int], pad: int) -> Sequences:
    """Every completion of one prompt as one batch."""
    found = completions(vocabulary, max_tokens)
    return Sequences.from_lists([prompt] * len(found), found, pad=pad)


def logprobs_of(model: Any, sequences: Sequences) -> Tensor:
    """(N, T) logprobs by the product's own forward pass, in fp64 whatever the model is trained in."""
    precise: TokenModel = copy.deepcopy(model).cpu().double()
    return measure(precise, sequences, partition(sequences, len(sequences))).logprobs


def outcome(world: World, logprobs: Tensor, beta: float) -> Outcome:
    """Exact expectations under a policy with these logprobs (N,) of whole completions."""
    probability = logprobs.exp()
    last = world.sequences.completion_lengths[:, None] - 1
    ended = world.sequences.completion_ids.gather(1, last).squeeze(1) == EOS

    def mean(x: Tensor) -> float:
        return float((probability * x).sum())

    score, kl = mean(world.scores), mean(logprobs - world.reference)
    return Outcome(
        objective=score - beta * kl,
        score=score,
        kl=kl,
        length=mean(world.sequences.completion_lengths),
        finished=mean(ended),
    )


def shaped_objective(world: World, token_logprobs: Tensor, beta: float) -> Tensor:
    """J as PPO sees it: the expected sum of the product's shaped rewards, from logprobs (N, T). Differentiable."""
    rewards = ops.shaped_rewards(
        scores=world.scores,
        kl=ops.kl_k1(token_logprobs, world.ref_logprobs),
        mask=world.sequences.completion_mask,
        kl_coef=beta,
    )
    return (token_logprobs.sum(1).exp() * rewards.sum(1)).sum()


def identity_error(world: World, token_logprobs: Tensor, beta: float) -> float:
    """|J* - J - beta KL(pi || pi*)|, with J from the product's shaped rewards: 0 if those say what the theory says."""
    policy = token_logprobs.sum(1)
    distance = float((policy.exp() * (policy - world.optimum(beta))).sum())
    objective = float(shaped_objective(world, token_logprobs, beta))
    return abs(world.value_of_optimum(beta) - objective - beta * distance)


def best_of_n(world: World, n: int) -> tuple[float, float]:
    """Score, and KL to the reference, of the best of n samples of the reference; ties are broken by lot.

    With q_s the reference's probability of a score below s and p_s of exactly s, the best has score s with probability
    (q_s + p_s)^n - q_s^n, and among completions of one score the reference's proportions stay.
    """
    scores, group = world.scores.mul(1e9).round().unique(return_inverse=True)
    exactly = torch.zeros_like(scores).index_add_(0, group, world.reference.exp())
    up_to = exactly.cumsum(0)
    best = up_to**n - (up_to - exactly).clamp(min=0) ** n
    kl = torch.xlogy(best, best / exactly).sum()
    return float((best * scores).sum() / 1e9), float(kl)


def best_of_n_bound(n: int) -> float:
    """What KL(best of n || reference) cannot exceed: log n - (n - 1) / n, reached where no scores tie."""
    return math.log(n) - (n - 1) / n

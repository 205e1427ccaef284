"""Pure tensor maths of PPO. Imports only torch; no state, no models, no configuration.

Shapes: B sequences, T completion tokens, V vocabulary. `mask` (B, T) is True on real tokens; what stands outside it is
never read, whatever it is (NaN included), and comes out as 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes."""


def masked(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x with 0 outside the mask; unlike multiplication, this also removes NaN and its gradient."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def alone(total: Tensor) -> Tensor:
    """The sum over processes where there is only one."""
    return total


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, reduce: Reduce = alone
) -> Float[Tensor, ""]:
    """Mean over the mask (of all processes, with `reduce`); 0 where the mask is empty."""
    return reduce(masked(x, mask).sum()) / reduce(mask.sum()).clamp(min=1)


def masked_var(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, reduce: Reduce = alone
) -> Float[Tensor, ""]:
    """Population variance over the mask (of all processes, with `reduce`); 0 where the mask is empty."""
    x = masked(x, mask)  # before the square, whose gradient at an infinite x would be 0 * inf = NaN
    return masked_mean((x - masked_mean(x, mask, reduce=reduce)) ** 2, mask, reduce=reduce)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    reduce: Reduce = alone,
) -> Float[Tensor, "*shape"]:
    """Scale to variance 1 over the mask, and to mean 0 unless `shift_mean` is False, which keeps the mean."""
    x = masked(x, mask)
    mean = masked_mean(x, mask, reduce=reduce)
    scaled = (x - mean) * torch.rsqrt(masked_var(x, mask, reduce=reduce) + eps)
    return masked(scaled if shift_mean else scaled + mean, mask)


def token_logprobs(
    logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"], *, temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """log softmax(logits / temperature) at `tokens`, in fp32 or better."""
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def entropy(logits: Float[Tensor, "B T V"], *, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Entropy in nats of softmax(logits / temperature); an impossible token (logit -inf) counts 0."""
    logprobs = _scaled(logits, temperature).log_softmax(-1)
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # 0 * -inf would be NaN
    return -(logprobs.exp() * finite).sum(-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def kl_k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Estimator of KL(policy || reference) from the policy's own samples: log p - log q. Unbiased, can be negative.

    The only one that belongs into the reward: its expected policy gradient is the KL's own (Schulman 2020).
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Estimator r - 1 - log r with r = q / p: unbiased, never negative, of low variance. For logging only."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def shaped_rewards(
    *,
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """Per-token reward: -kl_coef * kl on every token, plus the score on the last one (EOS); an empty row has none."""
    tokens_left = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (tokens_left == 1)
    return masked(-kl_coef * kl, mask) + masked(scores[:, None].to(kl.dtype).expand_as(kl), is_last)


def gae(
    *,
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and returns (advantages + values) by generalised advantage estimation, eq. 16 of Schulman et al. 2016.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  V = A = 0 after the last token.
    Where the mask has gaps (words of a tool or a user between the policy's own), t + 1 is the next token in the mask.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(next_value)
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        reversed_advantages.append(advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    advantages = masked(torch.stack(reversed_advantages[::-1], dim=1), mask)
    return advantages, advantages + values


def rloo_advantages(scores: Float[Tensor, " B"], samples: int) -> Float[Tensor, " B"]:
    """Score minus the mean score of the prompt's other samples (Ahmadian et al. 2024), which stand beside it.

    Raises ValueError for fewer than 2 samples, which would make every advantage 0.
    """
    if samples < 2:
        raise ValueError(f"RLOO needs at least 2 samples per prompt, not {samples}")
    groups = scores.reshape(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1)

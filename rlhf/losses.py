"""The two losses of PPO as pure functions: tensors in, per-token losses out. Imports only torch.

Both return one number per token and leave the aggregation to the caller, who alone knows the token count of the whole
optimiser batch: a mean taken here would weigh tokens differently from one micro-batch to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class TokenLoss(NamedTuple):
    """Loss per token, and where clipping decided it."""

    loss: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]


def policy_loss(
    *,
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    cliprange: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Clipped surrogate, eq. 7 of Schulman et al. 2017, to be minimised: max(-A r, -A clip(r, 1 - c, 1 + c)).

    `dual_clip` bounds the loss at dual_clip * |A| where A < 0 and the ratio r runs away (Ye et al. 2020, eq. 5).
    """
    # exp overflows at 88 in fp32, and an infinite ratio gives NaN gradients even where clipping would give 0
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=80))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return TokenLoss(loss, clipped > plain)


def value_loss(
    *,
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    cliprange_value: float | None,
) -> TokenLoss:
    """Half the squared error, the worse of the plain and the clipped prediction; no clipping when it is None."""
    plain = (values - returns) ** 2
    if cliprange_value is None:
        return TokenLoss(0.5 * plain, torch.zeros_like(plain, dtype=torch.bool))
    # not old + clamp(new - old), which rounds: an unclipped prediction must stay the very same number
    near_old = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    clipped = (near_old - returns) ** 2
    return TokenLoss(0.5 * torch.maximum(plain, clipped), clipped > plain)

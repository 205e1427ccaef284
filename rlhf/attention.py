"""Attention over short sequences on a CPU, where torch's fused kernel takes most of its time in the backward pass.

On two cores, forward and backward of 32 sequences of 34 tokens (9 heads of 64) take 27 ms a layer fused and 5 ms as the
plain operations; the fused one is ahead from some 500 tokens on (`python -m experiments.benchmarks.attention`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "sdpa_or_plain"
LONGEST = 256
"""Keys up to which the plain operations are taken."""
NOT_HERE = ("is_causal", "position_bias", "cache", "softcap")
"""What only transformers' own function understands."""


def choose(model: Any) -> None:
    """Let a model that uses torch's fused attention take plain operations for short sequences on a CPU."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    longest: int = LONGEST,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(query key^T scaling + mask) value, as (B, L, H, D): what transformers expects of an attention function.

    Shapes: query (B, H, L, D); key and value (B, H / groups, S, D); mask (B, 1, L, S) boolean or additive.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    length, keys = query.shape[2], key.shape[2]
    if (
        query.device.type != "cpu"
        or not 1 < length <= keys <= longest  # a decoding step has one query
        or (attention_mask is None and length < keys)
        or dropout
        or any(options.get(name) is not None for name in NOT_HERE)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if attention_mask is None:
        attention_mask = torch.ones(length, keys, dtype=torch.bool).tril()
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

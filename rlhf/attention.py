"""The attention that models loaded here use: transformers' own, but where this project has a better one.

Over short sequences on a CPU, torch's fused kernel takes most of its time in the backward pass. On two cores, forward
and backward of 32 sequences of 34 tokens (9 heads of 64) take 27 ms a layer fused and 5 ms as the plain operations; the
fused one is ahead from some 500 tokens on (`python -m experiments.benchmarks.attention`). The native engine decodes
rows of different lengths side by side, and brings an attention of its own for that (`generation.ragged`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "rlhf"
LONGEST = 256
"""Keys up to which the plain operations are taken."""
NOT_HERE = ("is_causal", "position_bias", "cache", "s_aux")
"""What only transformers' own functions understand."""


def choose(model: Any) -> bool:
    """Let a model attend through `attend` wherever that does the same; returns whether it does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    model = model.get_base_model() if hasattr(model, "peft_config") else model
    implementation = getattr(model.config, "_attn_implementation", None)
    # Gemma 2 caps its scores, which torch's fused kernel cannot do: it comes with plain operations, and so it is here
    replaced = ("sdpa", "eager") if getattr(model.config, "attn_logit_softcapping", None) else ("sdpa",)
    if implementation in replaced and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    longest: int = LONGEST,
    ragged: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(query key^T scaling + mask) value, as (B, L, H, D): what transformers expects of an attention function.

    Shapes: query (B, H, L, D); key and value (B, H / groups, S, D); mask (B, 1, L, S) boolean or additive. Where the
    model was given a `generation.ragged.Pass` as `ragged`, the tokens are those of many rows, and it attends.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    length, keys = query.shape[2], key.shape[2]
    foreign = [name for name in NOT_HERE if options.get(name) is not None]
    if ragged is not None:
        if foreign:
            raise NotImplementedError(f"{type(module).__name__} attends with {foreign[0]}")
        window = options.get("sliding_window")
        line = (each[0].transpose(0, 1) for each in (query, key, value))
        return ragged.attend(module.layer_idx, *line, scaling=scale, window=window, softcap=softcap)[None], None
    if softcap is None and (
        query.device.type != "cpu"
        or not 1 < length <= keys <= longest  # a decoding step has one query
        or (attention_mask is None and length < keys)
        or dropout
        or foreign
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **options
        )
    if attention_mask is None:
        attention_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    found = plain(query, key, value, attention_mask, scaling=scale, softcap=softcap, dropout=dropout)
    return found.transpose(1, 2).contiguous(), None


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """(B, H, L, D) by plain operations; the arguments are those of `attend`.

    Query heads that share keys and values stand as so many queries of one head: nothing is repeated.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    heads = key.shape[:2]
    grouped = (query * scaling).unflatten(1, (heads[1], -1)).flatten(2, 3)  # (B, shared heads, queries of each, D)
    scores = (grouped @ key.transpose(-1, -2)).view(*query.shape[:3], -1)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = (scores + mask).softmax(-1)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return (weights.view(*heads, -1, key.shape[2]) @ value).view(*query.shape[:3], -1)

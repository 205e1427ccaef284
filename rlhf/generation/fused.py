"""The layers of a sampling copy, in fewer operations.

While decoding, an operation meets a few rows only, and takes about as long to begin as to do. So a product of `packed`
weights adds the residual or applies the gate on its way out, positions turn heads in three operations, and nothing is
transposed: the same numbers as those of transformers' layers of the Llama kind, rounded less often.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from rlhf.generation.packed import PackedLinear
from rlhf.generation.ragged import Pass

LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' layers that are: norm, attention with rotary positions, norm, gated feed-forward."""
SILU = (SiLUActivation, nn.SiLU)
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fuse(model: nn.Module) -> bool:
    """Let a model, which is only sampled from with `ragged`, compute its layers here; returns whether it does.

    It does where all of them are of a kind known here and their weights are packed, without adapters between them.
    """
    body = getattr(model, "model", None)
    layers = list(getattr(body, "layers", []))
    if body is None or not layers or not all(map(_can_be_fused, layers)):
        return False
    body.rotary_emb.forward = partial(_angles, body.rotary_emb.forward)
    for layer in layers:
        layer.forward = partial(_layer, layer)
    return True


def _can_be_fused(layer: Any) -> bool:
    if type(layer).__name__ not in LAYERS or not isinstance(layer.mlp.act_fn, SILU):
        return False
    parts = {**layer.self_attn._modules, **layer.mlp._modules}
    return all(isinstance(getattr(parts.get(name), "forward", None), PackedLinear) for name in PRODUCTS)


def _angles(forward: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 1, D) cosines and sines of the N tokens; the sines of the first half with the sign of `_turned`."""
    cos, sin = forward(x, position_ids)
    sin[..., : sin.shape[-1] // 2].neg_()
    return cos[0][:, None], sin[0][:, None]


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of (N, heads, D): the halves of each head are the two coordinates that are turned."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _layer(
    layer: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    ragged: Pass,
    **_: Any,
) -> Tensor:
    """(1, N, hidden) from (1, N, hidden) of the N tokens of a pass."""
    attention, mlp, x = layer.self_attn, layer.mlp, hidden_states[0]
    normed = layer.input_layernorm(x)
    query, key, value = (
        product.forward(normed).unflatten(-1, (-1, attention.head_dim))
        for product in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    found = ragged.attend(
        attention.layer_idx,
        _turned(query, *position_embeddings),
        _turned(key, *position_embeddings),
        value,
        window=getattr(attention, "sliding_window", None),
        scaling=attention.scaling,
        softcap=None,
    )
    x = attention.o_proj.forward.plus(found.flatten(1), x)
    normed = layer.post_attention_layernorm(x)
    gated = mlp.up_proj.forward.times(normed, mlp.gate_proj.forward.silu(normed))
    return mlp.down_proj.forward.plus(gated, x)[None]

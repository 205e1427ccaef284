"""Exact sampling that is cheap over a large vocabulary: one uniform number a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (B,) drawn from softmax(logits / temperature) by inverting its distribution function, and their logprobs.

    One uniform number in [0, 1) a row instead of one per vocabulary entry. The function is summed in fp64 (over 50,000
    entries fp32 would lose the rare ones), in two steps, over blocks and then within one: it is never written out.
    """
    if logits.device.type != "cpu":
        return _sampled(logits, uniforms, temperature)
    rows = max(1, IN_CACHE // logits.shape[-1])
    parts = zip(logits.split(rows), uniforms.split(rows), strict=True)
    tokens, logprobs = zip(*(_sampled(*part, temperature) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


IN_CACHE = 8 * 49_152
"""Logits that a processor goes through together: what it needs of more does not stay in its cache."""


def _sampled(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperature
    highest = scaled.amax(-1, keepdim=True)
    weights = (scaled - highest).exp_()
    blocks = _in_blocks(weights)
    of_block = blocks.sum(-1).double().cumsum(-1)
    total = of_block[:, -1:]
    target = uniforms[:, None] * total
    block = torch.searchsorted(of_block, target, right=True).clamp(max=of_block.shape[1] - 1)
    before = torch.where(block > 0, of_block.gather(-1, (block - 1).clamp(min=0)), torch.zeros_like(target))
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block.squeeze(-1)].double().cumsum(-1)
    place = torch.searchsorted(inside, (target - before).clamp(min=0), right=True)
    # rounding may put the target at the very end of its block: then the last entry with any weight is meant
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    tokens = block * blocks.shape[-1] + torch.minimum(place, last)
    logprobs = scaled.gather(-1, tokens) - highest - total.log().float()
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def _in_blocks(weights: Tensor) -> Tensor:
    """(B, V) as (B, blocks, width), the last block filled up with zeros."""
    width = math.isqrt(weights.shape[-1] - 1) + 1
    missing = -weights.shape[-1] % width
    filled = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return filled.unflatten(-1, (-1, width))

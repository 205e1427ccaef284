"""The plain engine: the transformers model and its own cache, one token a step, finished rows leave the batch.

It decodes by itself rather than through `generate`, which applies whatever a checkpoint's generation config holds
(top-k 50 among it) and would make the sampled distribution differ from the one that the loss assumes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf.generation import Generated
from rlhf.generation.packed import Packed
from rlhf.models import keeps_logits
from rlhf.sequences import length_mask, pad_rows
from rlhf.sharding import whole


class PlainEngine:
    """Samples from a causal language model, in a bf16 copy of it where that is the precision to compute in.

    Given a device as `own_copy`, always in a copy there: the policy's weights may then be sharded, and processes, each
    of which samples another number of tokens, need not wait for one another at every one.
    """

    def __init__(
        self,
        policy: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        dtype: torch.dtype,
        batch_size: int,
        own_copy: torch.device | None = None,
    ):
        self._policy = policy
        self._eos = frozenset(eos_token_ids)
        self._pad = pad_token_id
        self._batch_size = batch_size
        self._model = copy.deepcopy(policy).to(own_copy, dtype) if own_copy or dtype != torch.float32 else policy
        self._packed = Packed(self._model, rows=batch_size) if self._model is not policy else None
        self._keeps_logits = keeps_logits(policy)

    def sync(self) -> None:
        """Copy the policy's trained weights into the sampling copy."""
        if self._packed is None:
            return
        changed: set[int] = set()
        with torch.no_grad():
            for theirs, mine in zip(self._policy.parameters(), self._model.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.copy_(whole(theirs))
                    changed.add(id(mine))
        self._packed.renew(changed)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[Generated]:
        """See `Engine.generate`. Every row has its own random numbers, so it does not depend on its neighbours."""
        uniforms = torch.rand(len(prompts), max_tokens, generator=generator, dtype=torch.float64)
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        results: dict[int, Generated] = {}
        for start in range(0, len(prompts), self._batch_size):
            rows = by_length[start : start + self._batch_size]
            with _evaluating(self._model):
                batch = self._decode([prompts[i] for i in rows], uniforms[rows], temperature)
            results.update(zip(rows, batch, strict=True))
        return [results[i] for i in range(len(prompts))]

    def _decode(self, prompts: list[Sequence[int]], uniforms: Tensor, temperature: float) -> list[Generated]:
        device = self._model.device
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        uniforms = uniforms.to(device)
        inputs = pad_rows(prompts, pad=self._pad, side="left").to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = length_mask(lengths, inputs.shape[1]).flip(1).long()
        positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        # The head on the last position only. An index rather than a count: a slice of one position is not contiguous,
        # and torch multiplies it as one product a row, each with its own copy of the whole head.
        options = {"logits_to_keep": torch.tensor([inputs.shape[1] - 1], device=device)} if self._keeps_logits else {}
        for step in range(uniforms.shape[1]):
            out = self._model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
            options = {}
            tokens, chosen = sample(out.logits[:, -1], uniforms[:, step], temperature=temperature)
            for row, token, logprob in zip(active, tokens.tolist(), chosen.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
            keep = [i for i, row in enumerate(active) if ids[row][-1] not in self._eos]
            if not keep:
                break
            cache = out.past_key_values
            if len(keep) < len(active):
                chosen_rows = torch.tensor(keep, device=device)
                cache.batch_select_indices(chosen_rows)
                tokens, mask, uniforms, lengths = (x[chosen_rows] for x in (tokens, mask, uniforms, lengths))
                active = [active[i] for i in keep]
            inputs = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            positions = (lengths + step)[:, None]
        return [Generated(row, lp, row[-1] in self._eos) for row, lp in zip(ids, logprobs, strict=True)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside the block; a model that was training goes on training after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


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
    highest = scaled.max(-1, keepdim=True).values
    weights = (scaled - highest).exp_()
    blocks = _in_blocks(weights)
    of_block = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
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

"""The plain engine: the transformers model and its own cache, one token a step, finished rows leave the batch.

It decodes by itself rather than through `generate`, which applies whatever a checkpoint's generation config holds
(top-k 50 among it) and would make the sampled distribution differ from the one that the loss assumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.generation import Generated
from rlhf.generation.copies import SamplingModel
from rlhf.generation.sampling import sample
from rlhf.models import keeps_logits
from rlhf.progress import OnProgress, ignore
from rlhf.sequences import length_mask, pad_rows


class PlainEngine:
    """Samples from any causal language model that transformers can decode with."""

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
        """`batch_size` rows are decoded together; `dtype` and `own_copy`: see `SamplingModel`."""
        self._eos = frozenset(eos_token_ids)
        self._pad = pad_token_id
        self.batch_size = batch_size
        self._sampled = SamplingModel(policy, dtype=dtype, rows=batch_size, own_copy=own_copy)
        self._keeps_logits = keeps_logits(policy)

    def sync(self) -> None:
        """See `Engine.sync`."""
        self._sampled.sync()

    def rest(self) -> None:
        """See `Engine.rest`."""
        self._sampled.rest()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        generator: torch.Generator,
        on_progress: OnProgress = ignore,
    ) -> list[Generated]:
        """See `Engine.generate`. Every row has its own random numbers, so it does not depend on its neighbours."""
        uniforms = torch.rand(len(prompts), max_tokens, generator=generator, dtype=torch.float64)
        by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        results: dict[int, Generated] = {}
        for start in range(0, len(prompts), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            with self._sampled.evaluating():
                batch = self._decode([prompts[i] for i in rows], uniforms[rows], temperature)
            results.update(zip(rows, batch, strict=True))
            on_progress(len(rows))
        return [results[i] for i in range(len(prompts))]

    def _decode(self, prompts: list[Sequence[int]], uniforms: Tensor, temperature: float) -> list[Generated]:
        model, device = self._sampled.model, self._sampled.device
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
            out = model(
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

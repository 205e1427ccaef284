"""The native engine: rows leave as soon as they end, and waiting prompts take their places.

Every row has its own length in the cache, and what is read for the first time shares a forward pass with what is being
decoded (`ragged`). Only the attention over prompts is padded. A prompt that several samples continue is read once. The
model is transformers' own, adapters included: what attends through `rlhf.attention` can be sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.generation import Generated
from rlhf.generation.batch import Batch
from rlhf.generation.copies import SamplingModel
from rlhf.generation.fused import fuse
from rlhf.generation.sampling import sample
from rlhf.progress import OnProgress, ignore


class NativeEngine:
    """Samples from a causal language model whose attention this project can take over: see `choice.why_not`."""

    def __init__(
        self,
        policy: Any,
        *,
        eos_token_ids: Sequence[int],
        dtype: torch.dtype,
        batch_size: int,
        own_copy: torch.device | None = None,
    ):
        """`batch_size` rows are decoded together; `dtype` and `own_copy`: see `SamplingModel`."""
        self._eos = frozenset(eos_token_ids)
        self.batch_size = batch_size
        self._sampled = SamplingModel(policy, dtype=dtype, rows=batch_size, own_copy=own_copy)
        if self._sampled.model is not policy:
            fuse(self._sampled.model)

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
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        batch = Batch(self._sampled.model, prompts, size=self.batch_size)
        with self._sampled.evaluating():
            while batch.goes_on:
                logits = batch.advance()
                drawn = uniforms[batch.numbers, [len(ids[number]) for number in batch.numbers]].to(logits.device)
                tokens, chosen = sample(logits, drawn, temperature=temperature)
                batch.fed = tokens.tolist()
                for number, token, logprob in zip(batch.numbers, batch.fed, chosen.tolist(), strict=True):
                    ids[number].append(token)
                    logprobs[number].append(logprob)
                ended = [self._ends(ids[number], max_tokens) for number in batch.numbers]
                batch.leave(ended)
                on_progress(sum(ended))
        return [Generated(row, lp, row[-1] in self._eos) for row, lp in zip(ids, logprobs, strict=True)]

    def _ends(self, ids: Sequence[int], max_tokens: int) -> bool:
        return ids[-1] in self._eos or len(ids) == max_tokens

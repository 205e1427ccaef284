"""The native engine: rows leave as soon as they end, and waiting prompts take their places.

Every row has its own length in the cache, and what is read for the first time shares a forward pass with what is being
decoded (`ragged`). Only the attention over prompts is padded. A prompt that several samples continue is read once. The
model is transformers' own, adapters included: what attends through `rlhf.attention` can be sampled from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf import attention
from rlhf.generation import Generated
from rlhf.generation.copies import SamplingModel
from rlhf.generation.ragged import KeyValues, Pass, Row
from rlhf.generation.sampling import sample
from rlhf.models import keeps_logits

MOST_READ = 4096
"""Prompt tokens that one pass reads at most, unless a single prompt is longer."""


class NativeEngine:
    """Samples from a causal language model whose attention this project can take over: see `why_not`."""

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

    def sync(self) -> None:
        """See `Engine.sync`."""
        self._sampled.sync()

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
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        batch = _Batch(self._sampled.model, prompts, size=self.batch_size)
        with self._sampled.evaluating():
            while batch.goes_on:
                logits = batch.advance()
                drawn = uniforms[batch.numbers, [len(ids[number]) for number in batch.numbers]].to(logits.device)
                tokens, chosen = sample(logits, drawn, temperature=temperature)
                batch.fed = tokens.tolist()
                for number, token, logprob in zip(batch.numbers, batch.fed, chosen.tolist(), strict=True):
                    ids[number].append(token)
                    logprobs[number].append(logprob)
                batch.leave([self._ends(ids[number], max_tokens) for number in batch.numbers])
        return [Generated(row, lp, row[-1] in self._eos) for row, lp in zip(ids, logprobs, strict=True)]

    def _ends(self, ids: Sequence[int], max_tokens: int) -> bool:
        return ids[-1] in self._eos or len(ids) == max_tokens


@dataclass
class _Waiting:
    """A prompt, and which of the call's completions of it have not been begun."""

    ids: tuple[int, ...]
    numbers: list[int]


class _Read(NamedTuple):
    """A prompt that a pass reads, and the rows that continue it at once."""

    prompt: _Waiting
    rows: list[Row]


class _Begun(NamedTuple):
    """A prompt that was read when there was not room enough for all of its rows."""

    prompt: _Waiting
    kept: Row
    """Its keys and values."""
    logits: Tensor
    """(1, V) after its last token."""


class _Batch:
    """The rows that are being decoded, and the prompts that wait until one of them ends."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], *, size: int):
        samples: dict[tuple[int, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            samples.setdefault(tuple(prompt), []).append(number)
        # neighbours in length are read together
        by_length = sorted(samples.items(), key=lambda pair: -len(pair[0]))
        self._queue = deque(_Waiting(ids, numbers) for ids, numbers in by_length)
        self._begun: _Begun | None = None
        self._model, self._size = model, size
        self._cache = KeyValues()
        self._rows: list[Row] = []
        self.numbers: list[int] = []
        """Which of the call's completions each row is."""
        self.fed: list[int] = []
        """The token that each is fed next."""
        self.windows: dict[int, int | None] = {}
        """How many tokens each layer turned out to see; None for all."""

    @property
    def goes_on(self) -> bool:
        """Whether any row has not ended."""
        return bool(self.numbers or self._begun or self._queue)

    def advance(self) -> Tensor:
        """Next-token logits (R, V) of all rows, those among them that have just been taken in."""
        decoding = self._rows[:]
        resumed = self._resume()
        read = self._take_in()
        if not (decoding or read):
            return torch.cat(resumed)
        logits, kept = self._forward(decoding, read)
        if kept:
            self._begun = _Begun(read[-1].prompt, kept, logits[-1:].clone())
        counts = [len(each.rows) for each in read]
        if not resumed and counts == [1] * len(read):
            return logits
        repeats = torch.tensor(counts, dtype=torch.long, device=logits.device)
        return torch.cat([logits[: len(decoding)], *resumed, logits[len(decoding) :].repeat_interleave(repeats, 0)])

    def leave(self, ended: Sequence[bool]) -> None:
        """Drop the rows that have ended."""
        self._cache.release([row for row, is_over in zip(self._rows, ended, strict=True) if is_over])
        stay = [not is_over for is_over in ended]
        self._rows = list(compress(self._rows, stay))
        self.numbers = list(compress(self.numbers, stay))
        self.fed = list(compress(self.fed, stay))

    def _resume(self) -> list[Tensor]:
        """Take in more rows of a prompt that has been read already; returns their logits."""
        if self._begun is None or len(self._rows) == self._size:
            return []
        prompt, kept, logits = self._begun
        rows = self._admit(prompt, lambda: self._cache.copy_of(kept))
        if not prompt.numbers:
            self._cache.release([kept])
            self._begun = None
        return [logits.expand(len(rows), -1)]

    def _take_in(self) -> list[_Read]:
        """Take in prompts that wait, longest first."""
        read: list[_Read] = []
        tokens = 0
        while self._queue and len(self._rows) < self._size:
            tokens += len(self._queue[0].ids)
            if read and tokens > MOST_READ:
                break
            prompt = self._queue.popleft()
            read.append(_Read(prompt, self._admit(prompt, Row)))
        return read

    def _admit(self, prompt: _Waiting, new: Callable[[], Row]) -> list[Row]:
        free = self._size - len(self._rows)
        admitted, prompt.numbers = prompt.numbers[:free], prompt.numbers[free:]
        rows = [new() for _ in admitted]
        self.numbers += admitted
        self._rows += rows
        return rows

    def _forward(self, decoding: Sequence[Row], read: Sequence[_Read]) -> tuple[Tensor, Row | None]:
        """(R + P, V) logits after the next token of each decoding row and after each prompt.

        Of a prompt that more rows wait for, a copy of what was read, too.
        """
        kept = Row() if read and read[-1].prompt.numbers else None
        receivers = [each.rows for each in read]
        if kept:
            receivers[-1] = [*receivers[-1], kept]
        prompts = [each.prompt.ids for each in read]
        positions = [*(row.length for row in decoding), *chain(*(range(len(ids)) for ids in prompts))]
        ends = [*range(len(decoding)), *(len(decoding) - 1 + end for end in accumulate(map(len, prompts)))]
        device = self._model.device
        ragged = Pass(self._cache, decoding, list(zip(map(len, prompts), receivers, strict=True)), device=device)
        self.windows = ragged.windows
        tokens = torch.tensor([self.fed + list(chain(*prompts))], device=device)
        out = self._model(
            input_ids=tokens,
            position_ids=torch.tensor([positions], device=device),
            attention_mask=tokens.new_zeros(
                1, 1, 1, 1
            ),  # of four dimensions, so that none is made: `ragged` has its own
            use_cache=False,
            logits_to_keep=torch.tensor(ends, device=device),
            ragged=ragged,
        )
        return out.logits[0], kept


# ---------------------------------------------------------------- where it may be used


def why_not(policy: Any) -> str | None:
    """Why this engine cannot sample from a model; None where it can, which is proven on two short rows.

    The model's attention is replaced by `rlhf.attention` where that does the same.
    """
    config = policy.config.get_text_config()
    if not keeps_logits(policy):
        return "it has no `logits_to_keep`"
    if not attention.choose(policy):
        return f"its attention ({config._attn_implementation}) cannot be taken over"
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of another kind ({', '.join(sorted(kinds))})"
    if _is_named(getattr(config, "rope_parameters", None), SHARED_POSITIONS):
        return "its positions depend on the longest row of a batch"
    try:
        gap, windows = _measured(policy)
    except Exception as error:  # whatever a model of any architecture may raise over inputs that it did not expect
        return f"it cannot take rows of different lengths in one line ({type(error).__name__})"
    if windows != _windows(config):
        return "its layers do not say how far they see"
    return None if gap <= EXACT else f"its logits would differ by {gap:.1e}"


EXACT = 1e-4
"""Largest difference that the way of computing may make to logits, relative to the largest of them, in fp32."""
SHARED_POSITIONS = ("dynamic", "longrope")
"""Rotary embeddings that all rows of a batch have in common."""


@torch.no_grad()
def _measured(policy: Any) -> tuple[float, dict[int, int | None]]:
    """How far logits are from the model's own, read and decoded, relative to the largest; and what each layer sees."""
    size = policy.config.get_text_config().vocab_size
    prompts, fed = [[i % size for i in range(3, 10)], [i % size for i in range(1, 5)]], [2 % size, 5 % size]
    batch = _Batch(policy, prompts, size=2)
    found = [batch.advance()]
    batch.fed = fed
    found.append(batch.advance())
    rows = [*prompts, *([*prompt, token] for prompt, token in zip(prompts, fed, strict=True))]
    own = [policy(input_ids=torch.tensor([row], device=policy.device), use_cache=False).logits[0, -1] for row in rows]
    difference = (torch.cat(found) - torch.stack(own)).abs().max() / torch.stack(own).abs().max()
    return float(difference), batch.windows


def _windows(config: Any) -> dict[int, int | None]:
    """How many tokens each layer sees, by the model's configuration; None for all."""
    window, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}


def _is_named(parameters: Any, names: Sequence[str]) -> bool:
    """Whether a rotary embedding of the model, or of one kind of its layers, has one of these types."""
    if not isinstance(parameters, dict):
        return False
    return parameters.get("rope_type") in names or any(_is_named(inner, names) for inner in parameters.values())

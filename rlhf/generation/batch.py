"""Which rows a forward pass decodes and which prompts it reads, for the native engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.generation.ragged import KeyValues, Pass, Row

MOST_READ = 4096
"""Prompt tokens that one pass reads at most, unless a single prompt is longer."""


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


class Batch:
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

"""How much there is to do in a step: how long completions become, and what micro-batches they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.flops import Fed
from rlhf.generation import Generated
from rlhf.micro_batches import partition
from rlhf.rates import Work
from rlhf.sequences import Sequences


class Row(NamedTuple):
    """One sequence of a batch."""

    prompt: int
    """Tokens, at least 1."""
    completion: int
    is_read: bool = True
    """Whether an engine that `refills` reads the prompt for it: not where another row continues the same one."""


@dataclass(frozen=True)
class Lengths:
    """How long completions become, from some that were sampled, not all of them to the end."""

    longer: Tensor
    """(T,) share of completions that have more than t tokens: 1 at t = 0, and what is left at the limit T is cut."""

    @staticmethod
    def of(sampled: Sequence[Generated], *, limit: int) -> Lengths:
        """Kaplan and Meier's estimate; beyond the longest that was sampled, completions end as often as they did."""
        ends, at_risk = torch.zeros(limit, dtype=torch.float64), torch.zeros(limit, dtype=torch.float64)
        for each in sampled:
            at_risk[: len(each.ids)] += 1
            ends[len(each.ids) - 1] += each.finished
        usual = ends.sum() / at_risk.sum()
        hazard = torch.where(at_risk > 0, ends / at_risk.clamp(min=1), usual)
        survival = (1 - hazard).cumprod(0)
        return Lengths(torch.cat([torch.ones(1, dtype=torch.float64), survival[:-1]]))

    @property
    def limit(self) -> int:
        """The most tokens that a completion may have."""
        return len(self.longer)

    @property
    def mean(self) -> float:
        """Tokens of a completion."""
        return float(self.longer.sum())

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Lengths of `count` completions."""
        uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
        return [int((self.longer > u).sum().clamp(min=1)) for u in uniforms]


def decoding(rows: Sequence[Row], *, together: int, refills: bool) -> Work:
    """What sampling these rows costs by, `together` at a time and the longest prompts first.

    An engine that `refills` lets a waiting row take the place of one that ends, and pads no prompt (`NativeEngine`).
    """
    rows = _as_read(rows, together, refills)
    return {
        "prompt_tokens": float(sum(row.prompt for row in rows if row.is_read)),
        "decode_steps": float(_steps(rows, together, refills)),
        "sampled_tokens": float(sum(row.completion for row in rows)),
        "read_tokens": sum(map(_read, rows)),
    }


def decoded(rows: Sequence[Row], *, together: int, refills: bool) -> Fed:
    """The same as what goes through the model: the last sampled token does not, and each needs the LM head once."""
    rows = _as_read(rows, together, refills)
    sampled = sum(row.completion for row in rows)
    prompts = [row.prompt for row in rows if row.is_read]
    pairs = sum(length**2 for length in prompts) + sum(map(_read, rows))
    return Fed(sum(prompts) + sampled - len(rows), pairs, sampled)


def _as_read(rows: Sequence[Row], together: int, refills: bool) -> list[Row]:
    """In the order of decoding; padded to the longest prompt of their batch where they are decoded by batches."""
    ordered = sorted(rows, key=lambda row: -row.prompt)
    if refills:
        return ordered
    return [Row(ordered[i - i % together].prompt, row.completion) for i, row in enumerate(ordered)]


def _steps(rows: Sequence[Row], together: int, refills: bool) -> int:
    """Passes until the last row has ended."""
    if not refills:
        return sum(max(row.completion for row in rows[i : i + together]) for i in range(0, len(rows), together))
    ends = [0] * min(together, len(rows))  # of the row in each place, a heap
    for row in rows:
        heapreplace(ends, ends[0] + row.completion)
    return max(ends)


def _read(row: Row) -> float:
    """Cached positions that the sampled tokens look at, themselves included."""
    return (row.completion - 1) * (row.prompt + row.completion / 2)


def micro_batches(rows: Sequence[Row], size: int, *, tokens: int | None = None, num_mini_batches: int = 1) -> list[Fed]:
    """What a rollout of these rows is forwarded as, see `micro_batches.partition`."""
    prompts, completions, _ = (torch.tensor(column) for column in zip(*rows, strict=True))
    blank = torch.zeros(len(rows), 1, dtype=torch.long)
    sequences = Sequences(blank, prompts, blank, completions)
    parts = partition(sequences, size, tokens=tokens, num_mini_batches=num_mini_batches)
    return [fed([rows[i] for i in part.tolist()]) for part in parts]


def fed(rows: Sequence[Row]) -> Fed:
    """One micro-batch: all tokens but the last, the shorter rows filled up."""
    width = max(row.prompt for row in rows) + max(row.completion for row in rows) - 1
    return Fed(width * len(rows), width**2 * len(rows), sum(row.completion for row in rows))


def forwarding(parts: Sequence[Fed]) -> Work:
    """What the cost of micro-batches depends on."""
    # tokens first: a single piece of work is then explained by them
    return {"tokens": sum(part.tokens for part in parts), "calls": len(parts)}


def total(parts: Sequence[Fed]) -> Fed:
    """All of them together."""
    return sum(parts, Fed(0.0, 0.0))

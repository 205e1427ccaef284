"""How much there is to do in a step: how long completions become, and what micro-batches they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.flops import Fed
from rlhf.generation import Generated
from rlhf.rates import Work
from rlhf.rollout import partition
from rlhf.sequences import Sequences


class Row(NamedTuple):
    """One sequence of a batch."""

    prompt: int
    """Tokens, at least 1."""
    completion: int


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


def decoding(rows: Sequence[Row], *, together: int) -> Work:
    """What sampling these rows costs by, `together` at a time and the longest prompts first."""
    work = {"prompt_tokens": 0.0, "decode_steps": 0.0, "sampled_tokens": 0.0, "read_tokens": 0.0}
    for width, part in _by_prompt(rows, together):
        work["prompt_tokens"] += width * len(part)
        work["decode_steps"] += max(part)
        work["sampled_tokens"] += sum(part)
        work["read_tokens"] += sum(_read(width, completion) for completion in part)
    return work


def decoded(rows: Sequence[Row], *, together: int) -> Fed:
    """The same as what goes through the model: the last sampled token does not, and each needs the LM head once."""
    whole = Fed(0.0, 0.0)
    for width, part in _by_prompt(rows, together):
        pairs = width**2 * len(part) + sum(_read(width, completion) for completion in part)
        whole += Fed(width * len(part) + sum(part) - len(part), pairs, sum(part))
    return whole


def _by_prompt(rows: Sequence[Row], together: int) -> Iterator[tuple[int, list[int]]]:
    """Of each batch that is decoded, the longest prompt and the lengths of the completions."""
    ordered = sorted(rows, key=lambda row: -row.prompt)
    for start in range(0, len(rows), together):
        part = ordered[start : start + together]
        yield part[0].prompt, [row.completion for row in part]


def _read(width: int, completion: int) -> float:
    """Cached positions that the sampled tokens look at, themselves included, after a prompt filled up to `width`."""
    return (completion - 1) * (width + completion / 2)


def micro_batches(rows: Sequence[Row], size: int) -> list[Fed]:
    """What a rollout of these rows is forwarded as, see `rollout.partition`."""
    prompts, completions = (torch.tensor(column) for column in zip(*rows, strict=True))
    blank = torch.zeros(len(rows), 1, dtype=torch.long)
    parts = partition(Sequences(blank, prompts, blank, completions), size)
    return [fed([rows[i] for i in part.tolist()]) for part in parts]


def fed(rows: Sequence[Row]) -> Fed:
    """One micro-batch: all tokens but the last, the shorter rows filled up."""
    width = max(row.prompt for row in rows) + max(row.completion for row in rows) - 1
    return Fed(width * len(rows), width**2 * len(rows), sum(row.completion for row in rows))


def forwarding(parts: Sequence[Fed]) -> Work:
    """What the cost of micro-batches depends on."""
    return {"calls": len(parts), "tokens": sum(part.tokens for part in parts)}


def total(parts: Sequence[Fed]) -> Fed:
    """All of them together."""
    return sum(parts, Fed(0.0, 0.0))

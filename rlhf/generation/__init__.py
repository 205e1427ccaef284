"""One protocol for engines that continue prompts, and the plain one behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from rlhf.progress import OnProgress, ignore


class Generated(NamedTuple):
    """One sampled completion."""

    ids: list[int]
    """The sampled token ids, the one that ended it included."""
    logprobs: list[float]
    """Of those tokens, as the sampler saw them, at the sampling temperature."""
    finished: bool
    """Whether it ended by itself rather than at the limit."""


class Engine(Protocol):
    """Draws completions from softmax(logits / temperature): no top-k, no top-p, no penalties."""

    batch_size: int
    """Most sequences decoded together. Lowered where memory does not suffice; the completions stay the same."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        generator: torch.Generator,
        on_progress: OnProgress = ignore,
    ) -> list[Generated]:
        """One completion of at most `max_tokens` ids for each prompt, in the order given.

        `on_progress` is told how many more are done.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's present weights."""
        ...

    def rest(self) -> None:
        """Give up the memory of what the next `sync` makes anew; no `generate` before that."""
        ...

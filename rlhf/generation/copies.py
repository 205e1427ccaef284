"""The model that an engine samples from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf.generation.packed import Packed
from rlhf.sharding import whole


class SamplingModel:
    """The policy itself, or a copy of it in bf16 where that is the precision to compute in.

    Given a device as `own_copy`, always a copy there: the policy's weights may then be sharded, and processes, each of
    which samples another number of tokens, need not wait for one another at every one.
    """

    def __init__(self, policy: Any, *, dtype: torch.dtype, rows: int, own_copy: torch.device | None = None):
        """`rows` is how many are usually decoded together."""
        self._policy = policy
        self.model = _copied(policy, own_copy, dtype) if own_copy or dtype != torch.float32 else policy
        self._packed = Packed(self.model, rows=rows) if self.model is not policy else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def sync(self) -> None:
        """Copy the policy's trained weights into the copy, and what a rest has let go."""
        if self._packed is None:
            return
        for theirs, mine in zip(self._policy.parameters(), self.model.parameters(), strict=True):
            if theirs.requires_grad or self._packed.lacks(mine):
                self._packed.take(mine, whole(theirs))

    def rest(self) -> None:
        """Let go of the packed weights: making them anew takes no time beside what a rest is for."""
        if self._packed is not None:
            self._packed.drop()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off inside the block; a model that was training goes on training after it."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            if was_training:
                self.model.train()


def _copied(policy: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """A copy with its weights in `dtype`, without one in fp32 on the way.

    Buffers stay in their own precision: rounded frequencies of a rotary embedding would turn late tokens to where the
    policy does not have them.
    """
    weights = {
        id(w): nn.Parameter(w.detach().to(device, dtype, copy=True), w.requires_grad) for w in policy.parameters()
    }
    twin = copy.deepcopy(policy, weights)
    return twin if device is None else twin.to(device)

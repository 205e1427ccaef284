"""Which engine samples from a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.generation import Engine
from rlhf.generation.native import NativeEngine, why_not
from rlhf.generation.plain import PlainEngine
from rlhf.progress import say


def engine_for(
    policy: Any,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    dtype: torch.dtype,
    batch_size: int,
    own_copy: torch.device | None = None,
) -> Engine:
    """The native engine, or the plain one with a line that says why. The arguments are those of both."""
    how = {"eos_token_ids": eos_token_ids, "dtype": dtype, "batch_size": batch_size, "own_copy": own_copy}
    reason = why_not(policy)
    if reason is None:
        return NativeEngine(policy, **how)
    say(f"{type(policy).__name__} is sampled by the plain engine, which is right but slow: {reason}")
    return PlainEngine(policy, pad_token_id=pad_token_id, **how)

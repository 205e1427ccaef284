"""Which engine samples from a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf import attention
from rlhf.generation import Engine
from rlhf.generation.batch import Batch
from rlhf.generation.native import NativeEngine
from rlhf.generation.plain import PlainEngine
from rlhf.generation.ragged import FEW
from rlhf.models import keeps_logits
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


def why_not(policy: Any) -> str | None:
    """Why the native engine cannot sample from a model; None where it can, which is proven on two short rows.

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
        # few rows and many attend in different ways
        (gap, windows), (of_many, _) = (_measured(policy, copies) for copies in (1, FEW))
    except Exception as error:  # whatever a model of any architecture may raise over inputs that it did not expect
        return f"it cannot take rows of different lengths in one line ({type(error).__name__})"
    if windows != _windows(config):
        return "its layers do not say how far they see"
    gap = max(gap, of_many)
    return None if gap <= EXACT else f"its logits would differ by {gap:.1e}"


EXACT = 1e-4
"""Largest difference that the way of computing may make to logits, relative to the largest of them, in fp32."""
SHARED_POSITIONS = ("dynamic", "longrope")
"""Rotary embeddings that all rows of a batch have in common."""


@torch.no_grad()
def _measured(policy: Any, copies: int) -> tuple[float, dict[int, int | None]]:
    """How far logits are from the model's own, read and decoded, relative to the largest; and what each layer sees.

    Of two prompts with so many samples of each.
    """
    size = policy.config.get_text_config().vocab_size
    prompts, fed = [[i % size for i in range(3, 10)], [i % size for i in range(1, 5)]], [2 % size, 5 % size]
    batch = Batch(policy, [prompt for prompt in prompts for _ in range(copies)], size=2 * copies)
    found = [batch.advance()]
    batch.fed = [token for token in fed for _ in range(copies)]
    found.append(batch.advance())
    rows = [*prompts, *([*prompt, token] for prompt, token in zip(prompts, fed, strict=True))]
    own = torch.stack(
        [policy(input_ids=torch.tensor([row], device=policy.device), use_cache=False).logits[0, -1] for row in rows]
    )
    difference = (torch.cat(found) - own.repeat_interleave(copies, 0)).abs().max() / own.abs().max()
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

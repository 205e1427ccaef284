"""Plain attention for short sequences: the outputs and gradients of torch's fused attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import attention
from tests.rlhf import tiny

NAMES = ("llama", "qwen3", "gpt2", "opt")


def outputs(model: Any, mask: Tensor | None) -> dict[str, Tensor]:
    """Logits on real tokens, and every gradient of a sum over them."""
    model.zero_grad()
    logits = model(input_ids=tiny.IDS, attention_mask=mask).logits
    kept = logits if mask is None else logits[mask.bool()]
    kept.square().sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": kept.detach(), **gradients}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_fused_attention(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones_like(tiny.IDS) if padded else None
    if mask is not None:
        mask[0, :2] = mask[1, -1] = 0
    model = tiny.build(name)
    assert model.config._attn_implementation == "sdpa"
    fused = outputs(model, mask)
    attention.choose(model)
    shorter: list[int] = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, *a, **k: (shorter.append(1), softmax(x, *a, **k))[1])
    plain = outputs(model, mask)
    assert shorter, "the plain operations were not taken"
    for key, expected in fused.items():
        torch.testing.assert_close(plain[key], expected, rtol=2e-4, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_gemma_keeps_its_own_attention() -> None:
    """It caps its scores, which neither function here does."""
    model = tiny.build("gemma2")
    before = model.config._attn_implementation
    attention.choose(model)
    assert model.config._attn_implementation == before == "eager"


def test_long_sequences_and_decoding_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    attention.choose(model)
    monkeypatch.setattr(Tensor, "softmax", None)  # the plain operations would fail
    model(input_ids=torch.zeros(1, attention.LONGEST + 1, dtype=torch.long) + 5, use_cache=False)
    monkeypatch.undo()
    cache = model(input_ids=tiny.IDS, use_cache=True).past_key_values
    monkeypatch.setattr(Tensor, "softmax", None)
    model(input_ids=tiny.IDS[:, :1], past_key_values=cache, use_cache=True)

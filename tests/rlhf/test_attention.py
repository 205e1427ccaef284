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


@pytest.mark.parametrize("padded", [False, True])
def test_gemmas_capped_scores_are_those_of_its_own_attention(padded: bool) -> None:
    """Of rows longer than the window of half of its layers, with scores that the cap bends."""
    model = tiny.build("gemma2", attn_logit_softcapping=0.02)
    mask = torch.ones_like(tiny.IDS) if padded else None
    if mask is not None:
        mask[0, :2] = mask[1, -1] = 0
    assert model.config._attn_implementation == "eager"
    own = outputs(model, mask)
    assert attention.choose(model)
    for key, found in outputs(model, mask).items():
        torch.testing.assert_close(found, own[key], rtol=2e-4, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")
    capped = outputs(tiny.build("gemma2", attn_logit_softcapping=50.0), mask)["logits"]
    assert not torch.allclose(own["logits"], capped, rtol=1e-2, atol=1e-2), "the cap is too wide to be seen"


def test_long_sequences_and_decoding_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    attention.choose(model)
    monkeypatch.setattr(Tensor, "softmax", None)  # the plain operations would fail
    model(input_ids=torch.zeros(1, attention.LONGEST + 1, dtype=torch.long) + 5, use_cache=False)
    monkeypatch.undo()
    cache = model(input_ids=tiny.IDS, use_cache=True).past_key_values
    monkeypatch.setattr(Tensor, "softmax", None)
    model(input_ids=tiny.IDS[:, :1], past_key_values=cache, use_cache=True)

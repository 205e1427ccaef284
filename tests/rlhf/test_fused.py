"""Layers that a sampling copy computes in fewer operations: transformers' numbers, within the rounding of bf16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rlhf import attention, models
from rlhf.config import Lora
from rlhf.generation.batch import Batch
from rlhf.generation.fused import fuse
from rlhf.generation.native import NativeEngine
from rlhf.generation.packed import Packed, PackedLinear
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Without it no weight is packed, and there is nothing to fuse: both sides of each comparison are transformers'."""
BIASED = {"attention_bias": True}
NARROW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", BIASED | {"mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 16}),
    ("qwen3", {}),
    ("qwen3", BIASED | NARROW | {"use_sliding_window": True}),
]
PROMPTS = [list(range(20, 33)), [40, 41], [50, 60, 70, 80, 90, 100], [7]]
FED = [[11, 12], [13, 14], [15, 16], [17, 18]]


def packed(model: Any) -> Any:
    """A copy in bf16 with packed weights; buffers keep their precision."""
    weights: dict[int, Any] = {id(w): torch.nn.Parameter(w.detach().bfloat16()) for w in model.parameters()}
    twin = copy.deepcopy(model, weights)
    Packed(twin, rows=len(PROMPTS))
    return twin


@torch.no_grad()
def passes(model: Any, *, copies: int) -> torch.Tensor:
    """(3, rows, V) logits: of prompts that are read, then of two tokens that are decoded, each row so many times."""
    batch = Batch(model, [prompt for prompt in PROMPTS for _ in range(copies)], size=copies * len(PROMPTS))
    found = [batch.advance()]
    order = batch.numbers
    for step in range(2):
        batch.fed = [FED[number // copies][step] for number in order]
        found.append(batch.advance())
    by_number = torch.tensor(order).argsort()
    return torch.stack(found)[:, by_number].float()


@torch.no_grad()
def exactly(model: Any, *, copies: int) -> torch.Tensor:
    """The same from whole sequences, by transformers, in fp32."""
    rows = [[prompt + fed[:step] for prompt, fed in zip(PROMPTS, FED, strict=True)] for step in range(3)]
    logits = [[model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in step] for step in rows]
    return torch.stack([torch.stack(step) for step in logits]).repeat_interleave(copies, 1)


@pytest.mark.parametrize("copies", [1, 20])  # few blocks, and many
@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_logits_are_as_near_to_those_in_fp32_as_transformers_own(
    name: str, changes: dict[str, Any], copies: int
) -> None:
    model = tiny.build(name, **changes)
    for weight_name, weight in model.named_parameters():
        if weight_name.endswith("bias"):
            torch.nn.init.normal_(weight, generator=world.seeded(3))
    attention.choose(model)
    exact = exactly(model, copies=copies)
    twin = packed(model)
    theirs = passes(twin, copies=copies)
    assert fuse(twin) == HAS_BF16
    ours = passes(twin, copies=copies)
    error, usual = ((found - exact).square().mean().sqrt() for found in (ours, theirs))
    assert error <= 1.25 * usual
    assert usual < 0.05 * exact.std(), "or nothing was compared"
    if HAS_BF16:
        assert not torch.equal(ours, theirs), "they round differently: equal ones would be transformers'"


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_layers_of_another_kind_are_left_alone(name: str) -> None:
    assert not fuse(packed(tiny.build(name)))


def test_layers_with_another_activation_are_left_alone() -> None:
    assert not fuse(packed(tiny.build("llama", hidden_act="gelu")))


def test_adapters_are_not_passed_by() -> None:
    assert not fuse(packed(models.choose_trainable(tiny.build("llama"), Lora())))


def test_weights_that_are_not_packed_are_left_alone() -> None:
    assert not fuse(tiny.build("llama"))


def test_the_engine_samples_from_fused_layers() -> None:
    """Of the copy alone: the policy is trained through transformers' own."""
    model = tiny.build("llama")
    attention.choose(model)
    engine = NativeEngine(model, eos_token_ids=(), dtype=torch.bfloat16, batch_size=4)
    fused = [hasattr(layer.forward, "func") for layer in engine._sampled.model.model.layers]
    assert fused == [HAS_BF16] * 3
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no products in bf16")
def test_what_follows_a_product_is_done_with_it() -> None:
    random = world.seeded(0)
    weight, bias, rows, other = (torch.randn(*shape, generator=random) for shape in ((48, 32), (48,), (5, 32), (5, 48)))
    weight, bias, rows, other = (each.bfloat16() for each in (weight, bias, rows, other))
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, 5)
    layer = PackedLinear(reordered, bias)
    product = rows.double() @ weight.double().T + bias.double()
    expected = {
        layer(rows): product,
        layer.silu(rows): product / (1 + (-product).exp()),
        layer.plus(rows, other): product + other.double(),
        layer.times(rows, other): product * other.double(),
    }
    for found, want in expected.items():
        torch.testing.assert_close(found.double(), want, rtol=2**-7, atol=2**-7)

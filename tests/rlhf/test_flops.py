"""Operations counted by hand for a tiny Llama, and by torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf import models
from rlhf.config import LastLayers
from rlhf.flops import Decoder, Fed, of_whole
from tests.rlhf import tiny

LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48
"""Queries, keys and values (two heads of 8 for four of queries), output, and the three matrices of the MLP."""
HEAD = 384 * 32
FED = Fed(tokens=20, pairs=200, completion=6)
"""Two rows of ten positions, on six of which the LM head runs."""


def llama(trainable: Any = "full") -> Any:
    return models.choose_trainable(tiny.build("llama"), trainable)


def test_a_forward_and_a_backward_pass_by_hand() -> None:
    decoder = Decoder.of(llama(), trunk_depth=0)
    assert LAYER == 7680
    layers, attention, head = 2 * 3 * 7680 * 20, 4 * 3 * 32 * 200, 2 * 12288 * 6
    assert decoder.forward(FED) == layers + attention + head == 921_600 + 76_800 + 147_456
    assert decoder.backward(FED) == 2 * layers + 2 * attention + 2 * head


def test_what_is_frozen_costs_no_gradient_of_its_own() -> None:
    decoder = Decoder.of(llama(LastLayers(1)), trunk_depth=2)
    layer, attention, head = 2 * LAYER * 20, 4 * 32 * 200, 2 * HEAD * 6
    assert decoder.trunk.forward(FED) == 2 * (layer + attention)
    assert decoder.trunk.backward(FED) == 0
    assert decoder.forward(FED) == layer + attention + head
    assert decoder.backward(FED) == 2 * layer + 2 * attention + head
    assert decoder.sampling(FED) == 3 * (layer + attention) + head


def test_an_adapter_is_trained_and_its_base_is_not() -> None:
    layers = of_whole(llama("lora"))
    adapter = 3 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (layers.weights, layers.trained) == (3 * LAYER + adapter, adapter)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_torch_counts_the_same(name: str) -> None:
    model = tiny.build(name, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(2, 10, dtype=torch.long), use_cache=False)
    # the product of positions with their inverse frequencies is counted by torch, too: 2 x rows x 4 x 10 at the most
    expected = Decoder.of(model, trunk_depth=0).forward(Fed(tokens=20, pairs=200, completion=20))
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-4)

"""LM head and softmax in one: torch's own log_softmax and its gradients, in fp64, whatever the chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf import lm_head
from rlhf.config import Lora
from rlhf.lm_head import LMHead

V, D, N = 37, 5, 23


def example(*, bias: bool, trained: bool) -> tuple[LMHead, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    linear = nn.Linear(D, V, bias=bias, dtype=torch.float64).requires_grad_(trained)
    with torch.no_grad():
        for weight in linear.parameters():
            weight.copy_(2 * torch.randn(weight.shape, generator=random, dtype=torch.float64))
    hidden = torch.randn(N, D, generator=random, dtype=torch.float64).requires_grad_()
    return LMHead(linear, None), hidden, torch.randint(V, (N,), generator=random)


def by_torch(head: LMHead, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = (head.linear(hidden) / temperature).log_softmax(-1)
    return logprobs[torch.arange(N), tokens], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 17 * V, 10**6])
@pytest.mark.parametrize(
    ("trained", "kept"), [(False, 0), (True, N * V - 1), (True, N * V)], ids=["frozen", "errors made again", "kept"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_torchs(
    temperature: float, bias: bool, trained: bool, kept: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "CHUNK", chunk)
    monkeypatch.setattr(lm_head, "KEPT", kept)
    again: list[int] = []
    made_again = lm_head._errors_again
    monkeypatch.setattr(lm_head, "_errors_again", lambda *a: (again.append(1), made_again(*a))[1])
    head, hidden, tokens = example(bias=bias, trained=trained)
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    wanted = [hidden, *(head.linear.parameters() if trained else ())]
    expected, entropy = by_torch(head, hidden, tokens, temperature)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), wanted)
    found, found_entropy = head(hidden, tokens, temperature=temperature, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_entropy, entropy, rtol=1e-12, atol=1e-12)
    assert not found_entropy.requires_grad
    for gradient, right in zip(torch.autograd.grad((found * upstream).sum(), wanted), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-12)
    assert bool(again) == (trained and kept < N * V)


def test_a_trained_head_on_frozen_hidden_states_gets_the_same_gradient() -> None:
    head, hidden, tokens = example(bias=False, trained=True)
    weight = head.linear.weight
    expected = torch.autograd.grad(by_torch(head, hidden, tokens, 1.0)[0].sum(), weight)[0]
    found = head(hidden.detach(), tokens, temperature=1.0, dtype=torch.float64)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), weight)[0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("trained", "kept"), [(False, 0), (True, 0), (True, 10**9)], ids=["frozen", "errors made again", "kept"]
)
def test_a_confident_token_keeps_its_small_gradient_in_bf16(
    kept: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p - 1 is 0 once p near 1 is rounded to bf16: it has to be subtracted before."""
    monkeypatch.setattr(lm_head, "KEPT", kept)
    linear = nn.Linear(2, 2, bias=False).requires_grad_(trained)
    linear.weight.data = torch.tensor([[8.0, 0.0], [0.0, 1.0]])
    hidden, token = torch.tensor([[1.0, 1.0]], requires_grad=True), torch.tensor([0])
    wanted = [hidden, linear.weight] if trained else [hidden]
    found, _ = LMHead(linear, None)(hidden, token, temperature=1.0, dtype=torch.bfloat16)
    miss = 1 / (1 + math.exp(7.0))  # the other token's chance: logits 8 and 1
    by_hand = [torch.tensor([[8 * miss, -miss]]), torch.tensor([[miss, miss], [-miss, -miss]])]
    for gradient, right in zip(torch.autograd.grad(found.sum(), wanted), by_hand, strict=False):
        torch.testing.assert_close(gradient, right, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_without_a_gradient_nothing_is_prepared_for_one(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, tokens = example(bias=True, trained=trained)
    expected, _ = by_torch(head, hidden, tokens, 1.0)
    monkeypatch.setattr(lm_head, "_minus_one_hot", None)
    with torch.no_grad():
        found, _ = head(hidden, tokens, temperature=1.0, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_impossible_token_counts_nothing_in_the_entropy() -> None:
    head, hidden, tokens = example(bias=True, trained=False)
    head.linear.bias[3] = -torch.inf
    logprobs, entropy = head(hidden, tokens, temperature=1.0, dtype=torch.float64)
    left = torch.arange(V) != 3
    expected = head.linear(hidden)[:, left].log_softmax(-1)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(logprobs.isinf(), tokens == 3)


def test_in_bf16_it_is_what_autocast_computes() -> None:
    """The head multiplies in bf16; softmax, sums and logprobs are fp32, as everywhere here."""
    head, hidden, tokens = example(bias=False, trained=False)
    head.linear.float()
    hidden = hidden.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head.linear(hidden)
    expected = logits.float().log_softmax(-1)[torch.arange(N), tokens]
    found, _ = head(hidden, tokens, temperature=1.0, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "plain"), [("llama", True), ("gpt2", True), ("qwen3", True), ("opt", True), ("gemma2", False)]
)
def test_only_a_head_that_is_plainly_linear_is_taken(name: str, plain: bool, policy: Callable[..., Any]) -> None:
    """Gemma 2 caps its logits."""
    assert (LMHead.of(policy(name)) is not None) == plain


def test_under_lora_the_head_is_that_of_the_base(policy: Callable[..., Any]) -> None:
    model = policy("llama", Lora(lora_rank=2))
    head = LMHead.of(model)
    assert head is not None
    assert head.linear is model.get_base_model().lm_head

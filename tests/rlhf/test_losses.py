"""The two losses of PPO: listed numbers, gradients by autograd, REINFORCE, and splits of the batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf import ops
from rlhf.losses import policy_loss, value_loss

DOUBLE = torch.float64
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=DOUBLE)


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual_clip", "loss", "gradient", "clipped"),
    [
        (1, 0.7, None, -0.7, -0.7, False),
        (1, 1.3, None, -1.2, 0, True),
        (-1, 0.7, None, 0.8, 0, True),
        (-1, 1.3, None, 1.3, 1.3, False),
        (-1, 4, None, 4, 4, False),
        (-1, 4, 3.0, 3, 0, False),
        (-1, 1.3, 3.0, 1.3, 1.3, False),
        (-1, 0.7, 3.0, 0.8, 0, True),
        (1, 4, 3.0, -1.2, 0, True),
        (1, 0.01, 3.0, -0.01, -0.01, False),
        (2, 1.0, None, -2, -2, False),
        (0, 5.0, 3.0, 0, 0, False),
    ],
)
def test_clipped_surrogate(
    advantage: float, ratio: float, dual_clip: float | None, loss: float, gradient: float, clipped: bool
) -> None:
    old = row(-1.3)
    new = (old + np.log(ratio)).requires_grad_()
    found = policy_loss(logprobs=new, old_logprobs=old, advantages=row(advantage), cliprange=0.2, dual_clip=dual_clip)
    assert found.loss.item() == pytest.approx(loss, abs=1e-12)
    assert bool(found.clipped) is clipped
    found.loss.sum().backward()
    assert new.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_step_is_reinforce(dtype: torch.dtype) -> None:
    """Where the policy has not moved, ratio is exactly 1, nothing is clipped, and the gradient is that of -A log p."""
    random = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 5, generator=random, dtype=dtype) * 9
    advantages = torch.randn(3, 5, generator=random, dtype=dtype)
    new = old.clone().requires_grad_()
    found = policy_loss(logprobs=new, old_logprobs=old, advantages=advantages, cliprange=0.2, dual_clip=3.0)
    assert not found.clipped.any()
    assert torch.equal(found.loss, -advantages)
    found.loss.sum().backward()
    assert torch.equal(new.grad, -advantages)


@given(st.integers(0, 2**32 - 1))
def test_surrogate_matches_its_definition_by_cases(seed: int) -> None:
    random = np.random.default_rng(seed)
    old, new, advantages = -random.exponential(size=(3, 2, 4))
    advantages = advantages - advantages.mean()
    found = policy_loss(
        logprobs=torch.from_numpy(new),
        old_logprobs=torch.from_numpy(old),
        advantages=torch.from_numpy(advantages),
        cliprange=0.1,
        dual_clip=2.0,
    )
    for loss, log_ratio, a in zip(found.loss.flatten(), (new - old).flatten(), advantages.flatten(), strict=True):
        ratio = np.exp(log_ratio)
        pessimistic = min(a * ratio, a * min(max(ratio, 0.9), 1.1))
        assert float(loss) == pytest.approx(-(pessimistic if a >= 0 else max(pessimistic, 2.0 * a)), abs=1e-12)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_runaway_ratio_stays_finite(advantage: float) -> None:
    new = torch.tensor([[150.0]], requires_grad=True)
    found = policy_loss(
        logprobs=new, old_logprobs=torch.zeros(1, 1), advantages=torch.full((1, 1), advantage), cliprange=0.2
    )
    found.loss.sum().backward()
    assert torch.isfinite(found.loss).all()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize(
    ("value", "loss", "gradient", "clipped"),
    [(1.1, 0.405, -0.9, False), (1.5, 0.32, 0, True), (0.5, 1.125, -1.5, False), (2.5, 0.32, 0, True)],
)
def test_clipped_value_loss(value: float, loss: float, gradient: float, clipped: bool) -> None:
    values = row(value).requires_grad_()
    found = value_loss(values=values, old_values=row(1.0), returns=row(2.0), cliprange_value=0.2)
    assert found.loss.item() == pytest.approx(loss, abs=1e-12)
    assert bool(found.clipped) is clipped
    found.loss.sum().backward()
    assert values.grad.item() == pytest.approx(gradient, abs=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_value_loss_without_clipping_is_half_the_squared_error(seed: int) -> None:
    values, old, returns = np.random.default_rng(seed).normal(size=(3, 2, 4))
    found = value_loss(
        values=torch.from_numpy(values),
        old_values=torch.from_numpy(old),
        returns=torch.from_numpy(returns),
        cliprange_value=None,
    )
    np.testing.assert_allclose(found.loss, 0.5 * (values - returns) ** 2)
    assert not found.clipped.any()


@pytest.mark.parametrize("seed", range(5))
def test_a_value_inside_the_clip_range_is_never_called_clipped(seed: int) -> None:
    """In fp32 too, where old + (new - old) is not new: least of all when the new value is the much smaller one."""
    random = torch.Generator().manual_seed(seed)
    old, new, returns = 0.1 * torch.randn(3, 8, 16, generator=random)
    old, new = old.clamp(-0.15, 0.15), 0.01 * new
    found = value_loss(values=new, old_values=old, returns=returns, cliprange_value=0.2)
    assert not found.clipped.any()
    assert torch.equal(found.loss, 0.5 * (new - returns) ** 2)


def _update_loss(numbers: dict[str, torch.Tensor], mask: torch.Tensor, rows: slice, tokens: int) -> torch.Tensor:
    """What a PPO update minimises on some rows of a batch: both losses, summed and divided by the batch's tokens."""
    part = {name: ops.masked(x[rows], mask[rows]) for name, x in numbers.items()}
    actor = policy_loss(
        logprobs=part["logprobs"], old_logprobs=part["old_logprobs"], advantages=part["advantages"], cliprange=0.2
    )
    critic = value_loss(
        values=part["values"], old_values=part["old_values"], returns=part["returns"], cliprange_value=0.2
    )
    return ops.masked(actor.loss + 0.1 * critic.loss, mask[rows]).sum() / tokens


def _numbers(seed: int, mask: torch.Tensor, garbage: float) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    numbers = {name: torch.randn(mask.shape, generator=random, dtype=DOUBLE) for name in names}
    dirty = {name: torch.where(mask, x, torch.full_like(x, garbage)) for name, x in numbers.items()}
    for name in ("logprobs", "values"):
        dirty[name].requires_grad_()
    return dirty


MASK = torch.arange(5) < torch.tensor([5, 3, 0, 1, 4])[:, None]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient(garbage: float) -> None:
    clean, dirty = _numbers(0, MASK, 0.0), _numbers(0, MASK, garbage)
    losses = [_update_loss(numbers, MASK, slice(None), 13) for numbers in (clean, dirty)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for name in ("logprobs", "values"):
        assert torch.equal(clean[name].grad, dirty[name].grad)
        assert (dirty[name].grad[~MASK] == 0).all()
        assert (dirty[name].grad[MASK] != 0).any()


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), max_size=3))
def test_any_split_into_micro_batches_adds_up_to_the_whole(seed: int, cuts: list[int]) -> None:
    whole, split = _numbers(seed, MASK, 0.0), _numbers(seed, MASK, float("nan"))
    tokens = int(MASK.sum())
    _update_loss(whole, MASK, slice(None), tokens).backward()
    edges = sorted({0, 5, *cuts})
    for start, end in itertools.pairwise(edges):
        _update_loss(split, MASK, slice(start, end), tokens).backward()
    for name in ("logprobs", "values"):
        torch.testing.assert_close(whole[name].grad, split[name].grad, rtol=0, atol=1e-15)

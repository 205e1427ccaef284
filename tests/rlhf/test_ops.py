"""The maths of PPO against numbers from the literature, scipy, sums over whole distributions, and autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.special import log_softmax

from rlhf import ops

DOUBLE = torch.float64
GARBAGE = (float("nan"), float("inf"), -float("inf"), 99.0)
POLICY, REFERENCE = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
EXACT_KL = 0.085123
EXACT_KL_GRADIENT = [0.175945, -0.098118, -0.077827]


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=DOUBLE)


def full(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[np.random.Generator, torch.Tensor]:
    """A source of numbers, and a right-padded mask in which rows may be empty."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed), torch.arange(width) < lengths[:, None]


def normal(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.normal(size=shape))


def spoilt(x: torch.Tensor, mask: torch.Tensor, garbage: float) -> torch.Tensor:
    return torch.where(mask, x, torch.full_like(x, garbage))


# ---------------------------------------------------------------- masks and whitening


@given(ragged(), st.sampled_from(GARBAGE))
def test_masked_statistics_are_those_of_the_tokens_alone(
    batch: tuple[np.random.Generator, torch.Tensor], garbage: float
) -> None:
    random, mask = batch
    x = normal(random, *mask.shape)
    tokens = x[mask].numpy()
    dirty = spoilt(x, mask, garbage)
    mean, variance = (tokens.mean(), tokens.var()) if tokens.size else (0.0, 0.0)
    assert float(ops.masked_mean(dirty, mask)) == pytest.approx(mean, abs=1e-12)
    assert float(ops.masked_var(dirty, mask)) == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("statistic", [ops.masked, ops.masked_mean, ops.masked_var, ops.whiten])
def test_no_gradient_leaves_the_mask(statistic, garbage: float) -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    x = spoilt(row(0.5, -1.0, 0.0).repeat(2, 1), mask, garbage).requires_grad_()
    (statistic(x, mask) ** 3).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~mask] == 0).all()


def test_the_mean_over_processes_is_the_mean_of_all_tokens() -> None:
    x, mask = row(1, 2, 3, 99), torch.tensor([[True, True, True, False]])
    elsewhere = row(9, 5)
    totals = iter([elsewhere.sum(), torch.tensor(2)])
    mean = ops.masked_mean(x, mask, reduce=lambda total: total + next(totals))
    assert float(mean) == pytest.approx((1 + 2 + 3 + 9 + 5) / 5)


def test_whiten_is_population_standardisation() -> None:
    x = row(1, 2, 3, 4)
    expected = [-1.341641, -0.447214, 0.447214, 1.341641]
    assert ops.whiten(x, full(1, 4)).tolist()[0] == pytest.approx(expected, abs=1e-6)
    kept = ops.whiten(x, full(1, 4), shift_mean=False)
    assert kept.tolist()[0] == pytest.approx([v + 2.5 for v in expected], abs=1e-6)


@given(ragged(), st.sampled_from(GARBAGE), st.booleans())
def test_whiten_reads_the_mask_only(
    batch: tuple[np.random.Generator, torch.Tensor], garbage: float, shift_mean: bool
) -> None:
    random, mask = batch
    x = normal(random, *mask.shape) * 3 + 1
    white = ops.whiten(spoilt(x, mask, garbage), mask, shift_mean=shift_mean)
    assert (white[~mask] == 0).all()
    tokens = x[mask].numpy()
    if tokens.size:
        expected = (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-8) + (0 if shift_mean else tokens.mean())
        np.testing.assert_allclose(white[mask].numpy(), expected, atol=1e-9)


def test_whiten_of_one_token_or_of_equal_tokens_is_zero() -> None:
    assert ops.whiten(row(7.0, 7.0, 7.0), full(1, 3)).tolist() == [[0, 0, 0]]
    assert ops.whiten(row(7.0), full(1, 1)).tolist() == [[0]]


# ---------------------------------------------------------------- logprobs and entropy


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.7, 1.0, 2.0]))
def test_logprobs_and_entropy_match_scipy(seed: int, temperature: float) -> None:
    random = np.random.default_rng(seed)
    logits, tokens = 5 * random.normal(size=(2, 3, 11)), random.integers(0, 11, size=(2, 3))
    expected = log_softmax(logits / temperature, axis=-1)
    ours = ops.token_logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), temperature=temperature)
    np.testing.assert_allclose(ours, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], atol=1e-12)
    entropy = ops.entropy(torch.from_numpy(logits), temperature=temperature)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_are_normalised_in_fp32(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(1, 4, 5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    tokens = torch.arange(4)[None]
    exact = log_softmax(logits.double().numpy(), axis=-1)
    ours = ops.token_logprobs(logits, tokens)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours[0], exact[0, range(4), range(4)], atol=3e-6)
    assert ops.entropy(logits).dtype == torch.float32


def test_entropy_bounds() -> None:
    assert float(ops.entropy(torch.zeros(1, 1, 8, dtype=DOUBLE))) == pytest.approx(np.log(8))
    assert float(ops.entropy(row(0.0, -1e5, -1e5)[None])) == 0.0


def test_impossible_tokens_neither_spoil_the_entropy_nor_its_gradient() -> None:
    logits = torch.tensor([[[0.3, -float("inf"), -0.4]]], dtype=DOUBLE, requires_grad=True)
    entropy = ops.entropy(logits)
    without = ops.entropy(torch.tensor([[[0.3, -0.4]]], dtype=DOUBLE))
    assert float(entropy.detach()) == pytest.approx(float(without), abs=1e-12)
    entropy.sum().backward()
    assert torch.isfinite(logits.grad).all()


# ---------------------------------------------------------------- KL


def test_kl_estimators_average_to_the_exact_kl() -> None:
    p, q = torch.from_numpy(np.log(POLICY)), torch.from_numpy(np.log(REFERENCE))
    assert (POLICY * np.log(POLICY / REFERENCE)).sum() == pytest.approx(EXACT_KL, abs=1e-6)
    k1, k3 = ops.kl_k1(p, q).numpy(), ops.kl_k3(p, q).numpy()
    assert k1 == pytest.approx([0.336472, -0.405465, -0.693147], abs=1e-6)
    assert (POLICY * k1).sum() == pytest.approx(EXACT_KL, abs=1e-6)
    assert (POLICY * k3).sum() == pytest.approx(EXACT_KL, abs=1e-6)  # 0.078211 with the ratio upside down
    deviation = [np.sqrt((POLICY * k**2).sum() - EXACT_KL**2) for k in (k1, k3)]
    assert deviation == pytest.approx([0.391, 0.076], abs=1e-3)


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=9), st.integers(0, 99))
def test_k3_is_never_negative_and_zero_only_at_equality(logprobs: list[float], seed: int) -> None:
    p = torch.tensor(logprobs, dtype=DOUBLE)
    q = p + normal(np.random.default_rng(seed), len(p))
    assert (ops.kl_k3(p, q) > 0).all()
    assert (ops.kl_k3(p, p) == 0).all()


def test_kl_gradients() -> None:
    """Through the reward, k1 gives the gradient of the KL; differentiated itself it gives none, and k3 a wrong one."""
    q = torch.from_numpy(np.log(REFERENCE))
    weights = torch.from_numpy(POLICY)

    def gradient(loss_of) -> list[float]:
        logits = torch.from_numpy(np.log(POLICY)).requires_grad_()
        loss_of(logits.log_softmax(-1)).backward()
        return logits.grad.tolist()

    exact = gradient(lambda p: (p.exp() * (p - q)).sum())
    assert exact == pytest.approx(EXACT_KL_GRADIENT, abs=1e-6)

    def as_reward(estimator):
        return gradient(lambda p: (weights * p * estimator(p, q).detach()).sum())

    def as_loss(estimator):
        return gradient(lambda p: (weights * estimator(p, q)).sum())

    assert as_reward(ops.kl_k1) == pytest.approx(EXACT_KL_GRADIENT, abs=1e-6)
    assert as_reward(ops.kl_k3) == pytest.approx([-0.024055, 0.001882, 0.022173], abs=1e-6)
    assert as_loss(ops.kl_k1) == pytest.approx([0, 0, 0], abs=1e-12)
    assert as_loss(ops.kl_k3) == pytest.approx([0.2, -0.1, -0.1], abs=1e-6)


def test_three_armed_bandit_converges_to_the_exact_optimum() -> None:
    """Exact policy gradient of shaped_rewards on one token: the fixed point is ref * exp(r / beta) / Z."""
    beta, scores = 0.5, torch.arange(3, dtype=DOUBLE)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    logits = reference.log().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(2000):
        logprobs = logits.log_softmax(-1)
        kl = ops.kl_k1(logprobs, reference.log()).detach()
        rewards = ops.shaped_rewards(scores=scores, kl=kl[:, None], mask=full(3, 1), kl_coef=beta)[:, 0]
        policy = logprobs.exp().detach()
        advantages = rewards - (policy * rewards).sum()
        optimiser.zero_grad()
        (-(policy * advantages * logprobs).sum()).backward()
        optimiser.step()
    policy = logits.detach().softmax(-1)
    assert policy.tolist() == pytest.approx([0.036667, 0.162559, 0.800774], abs=1e-6)
    assert float(policy @ scores) == pytest.approx(1.764107, abs=1e-5)
    kl = float(policy @ (policy / reference).log())
    assert kl == pytest.approx(0.915475, abs=1e-5)
    assert float(policy @ scores) - beta * kl == pytest.approx(1.306369, abs=1e-6)


# ---------------------------------------------------------------- rewards


def test_shaped_rewards() -> None:
    rewards = ops.shaped_rewards(
        scores=torch.tensor([1.0], dtype=DOUBLE), kl=row(0.4, -0.2, 0.2), mask=full(1, 3), kl_coef=0.05
    )
    assert rewards.tolist()[0] == pytest.approx([-0.02, 0.01, 0.99], abs=1e-12)


@given(ragged(), st.sampled_from(GARBAGE))
def test_the_score_lands_on_the_last_token_only(
    batch: tuple[np.random.Generator, torch.Tensor], garbage: float
) -> None:
    random, mask = batch
    kl, scores = normal(random, *mask.shape), normal(random, len(mask))
    rewards = ops.shaped_rewards(scores=scores, kl=spoilt(kl, mask, garbage), mask=mask, kl_coef=0.3)
    for b, length in enumerate(mask.sum(1).tolist()):
        expected = -0.3 * kl[b].numpy()
        expected[length:] = 0
        if length:
            expected[length - 1] += float(scores[b])
        np.testing.assert_allclose(rewards[b], expected, atol=1e-12)


def test_a_score_of_zero_or_an_undefined_score_of_an_empty_row_is_harmless() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    scores = torch.tensor([0.0, float("nan")], dtype=DOUBLE)
    rewards = ops.shaped_rewards(scores=scores, kl=torch.ones(2, 2, dtype=DOUBLE), mask=mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -0.5], [0, 0]]


# ---------------------------------------------------------------- advantages

REWARDS, VALUES = (-0.02, 0.01, 0.99), (0.5, 0.6, 0.8)


@pytest.mark.parametrize(
    ("gamma", "lam", "bootstrap", "expected"),
    [
        (1.0, 0.95, 0, (0.450975, 0.3905, 0.19)),
        (1.0, 1.0, 0, (0.48, 0.40, 0.19)),
        (1.0, 0.0, 0, (0.08, 0.21, 0.19)),
        (0.9, 0.8, 0, (0.212096, 0.2668, 0.19)),
        (1.0, 0.95, 0.7, (1.082725, 1.0555, 0.89)),
    ],
)
def test_gae(gamma: float, lam: float, bootstrap: float, expected: tuple[float, ...]) -> None:
    rewards = row(*REWARDS) + row(0, 0, gamma * bootstrap)  # a bootstrapped end is a reward of gamma * V(end)
    advantages, returns = ops.gae(rewards=rewards, values=row(*VALUES), mask=full(1, 3), gamma=gamma, lam=lam)
    assert advantages.tolist()[0] == pytest.approx(expected, abs=1e-6)
    assert returns.tolist()[0] == pytest.approx([a + v for a, v in zip(expected, VALUES, strict=True)], abs=1e-6)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gae_ends_at_the_score_and_never_reads_the_padding(garbage: float) -> None:
    """The score one slot after EOS, on a value of 0.9 there, would give (.446462, .38575, .185)."""
    mask = torch.tensor([[True, True, True, False, False]])
    pads = (garbage, garbage)
    advantages, returns = ops.gae(
        rewards=row(*REWARDS, *pads), values=row(*VALUES, *pads), mask=mask, gamma=1.0, lam=0.95
    )
    assert advantages.tolist()[0] == pytest.approx([0.450975, 0.3905, 0.19, 0, 0], abs=1e-6)
    assert returns.tolist()[0] == pytest.approx([0.950975, 0.9905, 0.99, 0, 0], abs=1e-6)


@given(ragged(), st.sampled_from(GARBAGE), st.floats(0.5, 1), st.floats(0, 1))
def test_gae_is_a_linear_filter_of_the_td_errors(
    batch: tuple[np.random.Generator, torch.Tensor], garbage: float, gamma: float, lam: float
) -> None:
    random, mask = batch
    rewards, values = normal(random, *mask.shape), normal(random, *mask.shape)
    advantages, returns = ops.gae(
        rewards=spoilt(rewards, mask, garbage), values=spoilt(values, mask, garbage), mask=mask, gamma=gamma, lam=lam
    )
    for b, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[b, :length].numpy(), values[b, :length].numpy()
        delta = r + gamma * np.append(v[1:], 0)[:length] - v
        expected = lfilter([1], [1, -gamma * lam], delta[::-1])[::-1] if length else delta
        np.testing.assert_allclose(advantages[b, :length], expected, atol=1e-10)
        np.testing.assert_allclose(returns[b, :length], expected + v, atol=1e-10)
        assert (advantages[b, length:] == 0).all()
        assert (returns[b, length:] == 0).all()


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_gae_closes_gaps_in_the_mask(mask: list[bool], seed: int) -> None:
    random = np.random.default_rng(seed)
    rewards, values, where = normal(random, 1, len(mask)), normal(random, 1, len(mask)), torch.tensor([mask])
    settings_ = {"gamma": 0.9, "lam": 0.8}
    gapped, _ = ops.gae(rewards=rewards, values=values, mask=where, **settings_)
    if any(mask):
        packed = rewards[where][None], values[where][None]
        closed, _ = ops.gae(rewards=packed[0], values=packed[1], mask=full(1, sum(mask)), **settings_)
        torch.testing.assert_close(gapped[where], closed[0])
    assert (gapped[~where] == 0).all()


def test_undiscounted_advantages_are_the_rest_of_the_rewards_less_the_value() -> None:
    random = np.random.default_rng(0)
    rewards, values = normal(random, 4, 6), normal(random, 4, 6)
    advantages, _ = ops.gae(rewards=rewards, values=values, mask=full(4, 6), gamma=1.0, lam=1.0)
    for b, t in itertools.product(range(4), range(6)):
        assert float(advantages[b, t]) == pytest.approx(float(rewards[b, t:].sum() - values[b, t]), abs=1e-12)


# ---------------------------------------------------------------- RLOO


def test_rloo() -> None:
    scores = torch.tensor([1.0, 2, 3, 6, 5, 5, 5, 5], dtype=DOUBLE)
    expected = [-2.666667, -1.333333, 0, 4, 0, 0, 0, 0]
    assert ops.rloo_advantages(scores, 4).tolist() == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_rloo_leaves_one_out(prompts: int, samples: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=prompts * samples)
    ours = ops.rloo_advantages(torch.from_numpy(scores), samples).numpy()
    for i, score in enumerate(scores):
        first = i - i % samples
        others = [scores[j] for j in range(first, first + samples) if j != i]
        assert ours[i] == pytest.approx(score - np.mean(others), abs=1e-12)


def test_rloo_refuses_single_samples() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        ops.rloo_advantages(torch.zeros(3), 1)

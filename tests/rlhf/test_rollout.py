"""The rollout: scores that cannot be used, rewards and advantages by hand, metrics, and independence of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf import ops, rollout
from rlhf.actor_critic import TokenOutputs
from rlhf.rollout import Rollout, Shaping, advantages_of, collect, explained_variance, metrics
from rlhf.scoring import checked_scores
from rlhf.sequences import Sequences
from rlhf.types import UserError
from tests.rlhf import ppo_world as world

TEXTS = ["one", "two", "three"]


class Table:
    """A model that is a table: logprobs, entropy and values by place, whatever is asked."""

    def __init__(self, logprobs: Tensor, values: Tensor | None = None) -> None:
        self.logprobs = logprobs
        self.values = torch.zeros_like(logprobs) if values is None else values

    def __call__(self, batch: Sequences, *, train_policy: bool = True) -> TokenOutputs:
        prompts = zip(batch.prompt_ids, batch.prompt_lengths, strict=True)
        rows = [world.PROMPTS.index(ids[-n:].tolist()) for ids, n in prompts]
        width = batch.completion_ids.shape[1]
        return TokenOutputs(*(x[rows, :width].clone() for x in (self.logprobs, -self.logprobs, self.values)))


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, c: [1.0, 2.0], "returned 2 scores for 3 completions"),
        (lambda p, c: [], "returned 0 scores for 3 completions"),
        (lambda p, c: [1.0, float("nan"), 2.0], "returned nan for the completion 'two': scores must be finite"),
        (lambda p, c: [1.0, 2.0, -math.inf], "returned -inf for the completion 'three'"),
        (lambda p, c: [1.0, None, 2.0], "returned None for the completion 'two': return a number"),
        (lambda p, c: [[1.0], [1.0, 2.0], [3.0]], "returned [1.0] for the completion 'one': return a number"),
        (lambda p, c: ["high", "low", "low"], "returned 'high' for the completion 'one': scores must be finite"),
        (lambda p, c: None, "returned a NoneType for 3 completions: return a list of numbers"),
        (lambda p, c: "123", "returned a str for 3 completions"),
        (lambda p, c: {"one": 1.0, "two": 2.0, "three": 3.0}, "returned a dict for 3 completions"),
        (lambda p, c: 1.0, "returned a float for 3 completions"),
        (lambda p, c: 1 / 0, "failed on 3 completions with ZeroDivisionError: division by zero"),
        (lambda p: [1.0], "failed on 3 completions with TypeError"),
    ],
)
def test_a_reward_that_cannot_be_used_is_named(reward: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        checked_scores(reward, TEXTS, TEXTS)
    assert message in str(raised.value)
    assert "<lambda>" in str(raised.value)


def test_what_the_reward_itself_says_to_the_user_is_passed_on() -> None:
    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        raise UserError("the classifier's folder is gone")

    with pytest.raises(UserError, match=r"^the classifier's folder is gone$"):
        checked_scores(reward, TEXTS, TEXTS)


@pytest.mark.parametrize(
    "scores", [[0, True, -2.5], torch.tensor([0.0, 1.0, -2.5]), np.array([0, 1, -2.5]), iter([0.0, 1.0, -2.5])]
)
def test_any_numbers_are_scores_zero_among_them(scores: Any) -> None:
    assert checked_scores(lambda p, c: scores, TEXTS, TEXTS) == [0.0, 1.0, -2.5]


def test_a_reward_cannot_change_the_rollouts_texts() -> None:
    texts = ["a", "b"]

    def reward(prompts: list[Any], completions: list[str]) -> list[float]:
        prompts.clear()
        completions[:] = ["x", "y"]
        return [0.0, 0.0]

    checked_scores(reward, texts, texts)
    assert texts == ["a", "b"]


def test_the_reward_reads_the_prompts_and_the_decoded_completions_in_order() -> None:
    asked: list[Any] = []

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        asked.extend(zip(prompts, completions, strict=True))
        return world.SCORES

    model = world.actor_critic()
    found = world.gathered(model, world.reference(model), reward=reward)
    assert asked == [(f"prompt {i}", str(ids)) for i, ids in enumerate(world.COMPLETIONS)]
    assert found.completions == tuple(map(str, world.COMPLETIONS))
    assert found.scores.tolist() == world.SCORES


# ---------------------------------------------------------------- what is in the loss


def test_the_ids_in_the_loss_are_the_sampled_ones() -> None:
    model = world.actor_critic()
    found = world.gathered(model, world.reference(model), decode=lambda ids: "a text that encodes to other ids")
    lengths = found.completion_lengths.tolist()
    assert [row[:n].tolist() for row, n in zip(found.completion_ids, lengths, strict=True)] == world.COMPLETIONS
    assert [
        row[-n:].tolist() for row, n in zip(found.prompt_ids, found.prompt_lengths.tolist(), strict=True)
    ] == world.PROMPTS


def test_eos_is_in_the_mask_and_what_follows_is_not() -> None:
    model = world.actor_critic()
    found = world.gathered(model, world.reference(model))
    assert found.completion_mask.sum(1).tolist() == [len(ids) for ids in world.COMPLETIONS]
    for row, ids in enumerate(world.COMPLETIONS):
        last = len(ids) - 1
        assert found.completion_mask[row, last]
        assert not found.completion_mask[row, last + 1 :].any()
        assert bool(found.finished[row]) == (ids[-1] == world.EOS)
        assert found.advantages[row, last] != 0, "EOS is an action and is learned"


def test_nothing_outside_the_mask_is_anything_but_zero() -> None:
    model = world.actor_critic()
    found = world.gathered(model, world.reference(model))
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns"):
        assert (getattr(found, name)[~found.completion_mask] == 0).all(), name


def test_a_rollout_does_not_depend_on_how_it_was_batched() -> None:
    model = world.actor_critic()
    ref = world.reference(model)
    found = [world.gathered(model, ref, micro_batch_size=size) for size in (1, 2, 3, 8)]
    for other in found[1:]:
        for field in fields(Rollout):
            one, two = getattr(found[0], field.name), getattr(other, field.name)
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=lambda m, n=field.name: f"{n}: {m}")


def test_the_kl_uses_the_same_temperature_for_policy_and_reference() -> None:
    """A reference equal to the policy is at KL 0 at any temperature; plain forwards give the logprobs at that one."""
    for temperature in (0.5, 1.7):
        model = world.actor_critic(temperature=temperature)
        equal = world.actor_critic(value=False, temperature=temperature)
        found = world.gathered(model, equal, temperature=temperature)
        assert found.kl.abs().max() < 1e-5
        prompt, completion = world.PROMPTS[1], world.COMPLETIONS[1]
        with torch.no_grad():
            plain = model.policy(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
        expected = [plain[3].log_softmax(-1)[32], plain[4].log_softmax(-1)[world.EOS]]
        assert found.logprobs[1, :2].tolist() == pytest.approx([float(x) for x in expected], abs=1e-5)


# ---------------------------------------------------------------- rewards and advantages, through collect


def made(shaping: Shaping, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Sequence[float]) -> Rollout:
    rows = len(logprobs)
    return collect(
        prompts=["p"] * rows,
        prompt_ids=world.PROMPTS[:rows],
        engine=world.Scripted(world.COMPLETIONS[:rows]),
        decode=str,
        reward=lambda p, c: list(scores),
        model=Table(logprobs, values),
        ref_model=Table(ref_logprobs),
        shaping=shaping,
        max_tokens=5,
        temperature=1.0,
        micro_batch_size=2,
        pad_token_id=world.PAD,
        generator=torch.Generator(),
    )


def test_the_listed_example_comes_out_of_a_rollout() -> None:
    """science.md 1c: beta 0.05, k1 (.4, -.2, .2), score 1, V (.5, .6, .8), lambda .95; the second row is other text."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, 99.0]])
    ref_logprobs = torch.tensor([[-1.4, -1.8, -0.7], [-3.0, -1.5, -99.0]])
    values = torch.tensor([[0.5, 0.6, 0.8], [0.1, 0.3, 99.0]])
    found = made(Shaping(kl_coef=0.05), logprobs, ref_logprobs, values, [1.0, 0.0])
    assert found.rewards[0].tolist() == pytest.approx([-0.02, 0.01, 0.99], abs=1e-6)
    assert found.returns[0].tolist() == pytest.approx([0.950975, 0.9905, 0.99], abs=1e-6)
    assert found.rewards[1].tolist() == pytest.approx([0, -0.025, 0], abs=1e-6)
    assert found.returns[1].tolist() == pytest.approx([0.1 + 0.2 + 0.95 * -0.325, -0.025, 0], abs=1e-6)
    raw = torch.tensor([0.450975, 0.3905, 0.19, 0.2 + 0.95 * -0.325, -0.325])
    whitened = (raw - raw.mean()) / (raw.var(correction=0) + 1e-8).sqrt()
    assert found.advantages[found.completion_mask].tolist() == pytest.approx(whitened.tolist(), abs=1e-5)
    assert found.kl.tolist() == pytest.approx([0.4, 0.5], abs=1e-6)


def test_the_penalty_for_a_missing_eos_is_taken_at_the_completions_last_token() -> None:
    zeros = torch.zeros(5, 5)
    found = made(Shaping(kl_coef=0.0, missing_eos_penalty=3.0), zeros, zeros, zeros, [1.0, 1.0, 0.0, 1.0, 1.0])
    assert found.finished.tolist() == [True, True, False, True, True]
    assert found.rewards.sum(1).tolist() == [1, 1, -3, 1, 1]
    assert found.rewards[2].tolist() == [0, 0, 0, 0, -3]
    assert found.scores.tolist() == [1, 1, 0, 1, 1], "the score itself stays what the reward said"


def test_the_kl_in_the_reward_is_k1_and_carries_no_gradient() -> None:
    logprobs = torch.randn(8, 5, generator=world.seeded(0))
    ref_logprobs = torch.randn(8, 5, generator=world.seeded(1))
    found = made(Shaping(kl_coef=0.3), logprobs, ref_logprobs, torch.zeros(8, 5), [0.0] * 8)
    mask = found.completion_mask
    torch.testing.assert_close(found.rewards[mask], -0.3 * (logprobs - ref_logprobs)[mask])


def test_rloo_compares_the_samples_of_a_prompt() -> None:
    rows = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 1.0, 1.0])
    zeros = torch.zeros(8, 5)
    _, advantages, returns = advantages_of(
        rows,
        scores=scores,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        shaping=Shaping(kl_coef=0.1, rloo_samples=4),
    )
    expected = torch.tensor([-8 / 3, -4 / 3, 0, 4, -2 / 3, -2 / 3, 2 / 3, 2 / 3])
    mask = rows.completion_mask
    torch.testing.assert_close(returns, ops.masked(expected[:, None].expand(8, 5), mask))
    assert float(advantages[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages[mask].var(correction=0)) == pytest.approx(1, abs=1e-5)


def test_whitened_rewards_keep_their_mean() -> None:
    rows = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    logprobs, ref_logprobs = (torch.randn(8, 5, generator=world.seeded(i)) for i in (0, 1))
    plain, whitened = (
        advantages_of(
            rows,
            scores=torch.tensor(world.SCORES),
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=torch.zeros(8, 5),
            shaping=Shaping(kl_coef=0.1, whiten_rewards=whiten),
        )[0][rows.completion_mask]
        for whiten in (False, True)
    )
    assert float(whitened.mean()) == pytest.approx(float(plain.mean()), abs=1e-6)
    assert float(whitened.var(correction=0)) == pytest.approx(1, abs=1e-4)


def test_advantages_are_whitened_over_all_processes() -> None:
    rows = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    numbers: dict[str, Any] = {
        "scores": torch.tensor(world.SCORES),
        "logprobs": torch.randn(8, 5, generator=world.seeded(0)),
        "ref_logprobs": torch.randn(8, 5, generator=world.seeded(1)),
        "values": torch.randn(8, 5, generator=world.seeded(2)),
        "shaping": Shaping(kl_coef=0.1),
    }
    alone = advantages_of(rows, **numbers)[1]
    twice = advantages_of(rows, **numbers, reduce=lambda total: 2 * total)[1]
    torch.testing.assert_close(alone, twice)


# ---------------------------------------------------------------- metrics


def test_metrics_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.4, -1.8, -0.7], [-3.0, -1.5, 0.0]])
    values = torch.tensor([[0.5, 0.6, 0.8], [0.1, 0.3, 0.0]])
    found = made(Shaping(kl_coef=0.05), logprobs, ref_logprobs, values, [1.0, -0.5])
    numbers = metrics(found, kl_coef=0.05)
    returns = found.returns[found.completion_mask]
    errors = returns - values[found.completion_mask]
    ratios = [-0.4, 0.2, -0.2, 0.0, -0.5]
    expected = {
        "objective/kl": 0.45,
        "objective/kl_k3": sum(math.exp(r) - 1 - r for r in ratios) / 2,
        "objective/kl_per_token": 0.9 / 5,
        "objective/kl_max_seq": 0.5,
        "objective/entropy": (3.5 + 4.0) / 2,
        "objective/non_score_reward": -0.05 * 0.45,
        "objective/scores": 0.25,
        "objective/scores_std": 0.75,
        "objective/scores_p5": -0.425,
        "objective/scores_p95": 0.925,
        "objective/rlhf_reward": 0.25 - 0.05 * 0.45,
        "policy/entropy_avg": 7.5 / 5,
        "returns/mean": float(returns.mean()),
        "returns/var": float(returns.var(correction=0)),
        "val/mean": 2.3 / 5,
        "val/var_explained": 1 - float((errors**2).mean() / returns.var(correction=0)),
        "val/num_eos_tokens": 2,
        "gen/eos_rate": 1.0,
        "gen/length_mean": 2.5,
        "gen/length_p95": 2.95,
        "gen/sampler_logprob_gap": -7.5 / 5,
    }
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert set(numbers) - set(expected) == {"gen/distinct2"}


def test_metrics_read_nothing_outside_the_mask() -> None:
    model = world.actor_critic()
    found = world.gathered(model, world.reference(model))
    clean = metrics(found, kl_coef=0.1)
    for name in ("logprobs", "ref_logprobs", "sampler_logprobs", "entropy", "values", "returns", "advantages"):
        getattr(found, name)[~found.completion_mask] = float("nan")
    assert metrics(found, kl_coef=0.1) == clean


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 2.0, 3.0], 1.0), ([2.0, 2.0, 2.0], 0.0), ([3.0, 2.0, 1.0], -3.0)]
)
def test_explained_variance(values: list[float], expected: float) -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])
    found = explained_variance(torch.tensor([[*values, -99.0]]), returns, mask)
    assert float(found) == pytest.approx(expected)
    assert float(explained_variance(returns, torch.ones_like(returns), mask)) == 0, "nothing to explain"


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
def test_the_partition_holds_every_row_once_and_neighbours_in_length(size: int) -> None:
    rows = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    parts = rollout.partition(rows, size)
    assert sorted(int(i) for part in parts for i in part) == list(range(8))
    assert all(len(part) == size for part in parts[:-1])
    lengths = (rows.prompt_lengths + rows.completion_lengths)[torch.cat(parts)]
    assert (lengths.diff() >= 0).all()


def test_measure_gives_the_model_only_the_padding_that_a_micro_batch_needs() -> None:
    rows = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    widths: list[tuple[int, int]] = []
    table = Table(torch.zeros(8, 5))

    def model(batch: Sequences, **options: Any) -> TokenOutputs:
        widths.append((batch.prompt_ids.shape[1], batch.completion_ids.shape[1]))
        return table(batch, **options)

    out = rollout.measure(model, rows, [torch.tensor([0, 5]), torch.tensor([3])])
    assert widths == [(1, 4), (6, 1)]
    assert out.logprobs.shape == (8, 5)

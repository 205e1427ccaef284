"""Micro-batches of so many rows or tokens: what is in them, how even they are, and that the loss does not care."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf import ops, rollout, update
from rlhf.actor_critic import TokenOutputs
from rlhf.config import PPOConfig
from rlhf.micro_batches import deal, partition
from rlhf.sequences import Sequences
from rlhf.types import ConfigError
from tests.rlhf import ppo_world as world


def ragged(count: int, seed: int = 0, longest: int = 40) -> Sequences:
    """Prompts and completions of 1 to `longest` tokens."""
    lengths = torch.randint(1, longest + 1, (2, count), generator=world.seeded(seed)).tolist()
    prompts, completions = ([[3] * length for length in part] for part in lengths)
    return Sequences.from_lists(prompts, completions, pad=0)


def tokens_of(rows: Sequences, part: Tensor) -> int:
    """What is forwarded for a micro-batch, padding included."""
    return len(part) * rows.select(part).width


# ---------------------------------------------------------------- the cut


@pytest.mark.parametrize("tokens", [1, 50, 100, 333, 10_000])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("num_mini_batches", [1, 3, 4])
def test_micro_batches_of_tokens_keep_to_them_and_hold_every_row_once(
    tokens: int, count: int, num_mini_batches: int
) -> None:
    rows = ragged(count)
    parts = partition(rows, 16, tokens=tokens, num_mini_batches=num_mini_batches)
    order = torch.cat(parts)
    assert sorted(order.tolist()) == list(range(count))
    assert ((rows.prompt_lengths + rows.completion_lengths)[order].diff() >= 0).all(), "neighbours in length"
    assert all(len(part) == 1 or tokens_of(rows, part) <= tokens for part in parts)
    assert len(parts) >= min(num_mini_batches, count)
    assert len(parts) % num_mini_batches == 0 or len(parts) == count


def test_there_are_no_more_micro_batches_than_the_tokens_ask_for() -> None:
    """Against every way to cut ten rows into neighbours."""
    rows = ragged(10, longest=9)
    order = torch.cat(partition(rows, 10))
    for tokens in (20, 40, 60, 100):
        fewest = 10
        for cuts in range(2**9):
            ends = [i + 1 for i in range(9) if cuts >> i & 1]
            sizes = [end - start for start, end in zip([0, *ends], [*ends, 10], strict=True)]
            parts = order.split(sizes)
            if all(len(part) == 1 or tokens_of(rows, part) <= tokens for part in parts):
                fewest = min(fewest, len(parts))
        assert len(partition(rows, 10, tokens=tokens)) == fewest


def test_equal_rows_are_cut_evenly() -> None:
    rows = Sequences.from_lists([[3] * 4] * 12, [[3] * 6] * 12, pad=0)
    assert [len(part) for part in partition(rows, 1, tokens=50)] == [4, 4, 4], "3 of at most 5 rows, not 5, 5 and 2"
    assert [len(part) for part in partition(rows, 1, tokens=1000, num_mini_batches=4)] == [3, 3, 3, 3]
    assert [len(part) for part in partition(rows, 1, tokens=119, num_mini_batches=1)] == [6, 6]


@pytest.mark.parametrize("seed", range(5))
def test_minibatches_are_about_even_in_tokens(seed: int) -> None:
    rows = ragged(128, seed)
    parts = partition(rows, 1, tokens=400, num_mini_batches=4)
    dealt = [sum(tokens_of(rows, part) for part in group) for group in deal(parts, 4, world.seeded(seed))]
    assert max(dealt) < 1.2 * min(dealt)
    assert max(map(len, parts)) >= 3 * min(map(len, parts)), "though they hold different numbers of rows"


def test_processes_cut_equally_many() -> None:
    """Otherwise one would wait for the forward pass of another with sharded weights for ever."""
    short, long = ragged(16, longest=5), ragged(16, longest=50)
    alone = [len(partition(rows, 1, tokens=120, num_mini_batches=2)) for rows in (short, long)]
    assert alone[0] < alone[1]
    chosen = torch.zeros(17)
    chosen[alone[1]] = 1
    for rows in (short, long):
        parts = partition(rows, 1, tokens=120, num_mini_batches=2, reduce=lambda total: total + chosen)
        assert len(parts) == alone[1]
        assert all(len(part) == 1 or tokens_of(rows, part) <= 120 for part in parts)


# ---------------------------------------------------------------- the loss


class Bigram(nn.Module):
    """A table in double precision: logits and value by the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = nn.Embedding(384, 384).double(), nn.Embedding(384, 1).double()
        for i, table in enumerate((self.policy, self.value)):
            nn.init.normal_(table.weight, std=0.3, generator=world.seeded(i))

    def forward(self, batch: Sequences, *, train_policy: bool = True) -> TokenOutputs:
        before = batch.model_inputs()["input_ids"][:, -batch.completion_ids.shape[1] :]
        logprobs = self.policy(before).log_softmax(-1)
        of_tokens = logprobs.gather(-1, batch.completion_ids[:, :, None]).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
        return TokenOutputs(of_tokens, entropy, self.value(before).squeeze(-1))

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())

    def value_parameters(self) -> list[nn.Parameter]:
        return list(self.value.parameters())


@pytest.mark.parametrize("split", [{"tokens": 1}, {"tokens": 9}, {"tokens": 20}, {"tokens": 999}, {"size": 3}])
def test_loss_and_gradient_are_those_of_any_other_split(split: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ref = Bigram(), Bigram()
    nn.init.normal_(ref.policy.weight, std=0.3, generator=world.seeded(7))
    batch = world.gathered(model, ref, micro_batch_size=8)
    noise = 0.3 * torch.randn(batch.logprobs.shape, generator=world.seeded(3), dtype=torch.float64)
    batch.logprobs.add_(ops.masked(noise, batch.completion_mask))
    monkeypatch.setattr(update, "SAME_POLICY_TOLERANCE", 10.0)
    found = []
    for size, tokens in ((8, None), (split.get("size", 8), split.get("tokens"))):
        gradients: dict[str, Tensor] = {}

        def note(learner: Any, _: float, gradients: dict[str, Tensor] = gradients) -> tuple[float, float]:
            gradients |= {name: w.grad.clone() for name, w in learner.model.named_parameters()}
            return 0.0, 0.0

        monkeypatch.setattr(update, "optimizer_step", note)
        settings = world.settings(micro_batch_size=size, micro_batch_tokens=tokens)
        learner: Any = world.learner(copy.deepcopy(model))  # type: ignore[arg-type]
        metrics = update.update(learner, batch, settings=settings, generator=world.seeded())
        found.append((metrics, gradients))
    (one, grads), (other, other_grads) = found
    assert other == pytest.approx(one, rel=1e-10, abs=1e-10)
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float64
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(other_grads[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", [8, 17, 40])
def test_the_rollouts_own_split_is_the_updates(tokens: int) -> None:
    model = world.actor_critic()
    forwarded: list[list[int]] = []
    learner = world.learner(model)
    plain = learner.forward

    def forward(part: Sequences, **options: Any) -> TokenOutputs:
        forwarded.append(part.prompt_ids[:, -1].tolist())
        return plain(part, **options)

    learner.forward = forward
    reference = world.reference(model)
    batch = world.gathered(forward, reference, micro_batch_tokens=tokens, num_mini_batches=2)
    measured, forwarded[:] = sorted(forwarded), []
    settings = world.settings(micro_batch_tokens=tokens, num_mini_batches=2)
    update.update(learner, batch, settings=settings, generator=world.seeded())
    assert sorted(forwarded) == measured
    assert len(measured) % 2 == 0


def test_a_run_of_token_budgets_takes_its_steps(tiny_model_folder: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    from rlhf import ppo

    result = ppo.train(
        world.config(tmp_path, micro_batch_tokens=24, num_mini_batches=3, total_episodes=16, value_warmup_steps=0),
        policy=world.policy(tiny_model_folder, tiny_tokenizer),
        tokenizer=tiny_tokenizer,
        reward=world.length_reward,
        prompts=world.TEXTS,
    )
    assert result.metrics["grad_norm/policy"] > 0
    assert rollout.partition is partition


# ---------------------------------------------------------------- the setting


def test_the_setting_is_checked() -> None:
    with pytest.raises(ConfigError, match="micro_batch_tokens is 0, but it must be above 0"):
        PPOConfig(micro_batch_tokens=0)
    with pytest.raises(ConfigError, match=r"num_mini_batches is 33, but it must be 1 to batch_size = 32$"):
        PPOConfig(batch_size=32, num_mini_batches=33, micro_batch_tokens=512)
    assert PPOConfig(batch_size=32, micro_batch_tokens=512).micro_batch_size == 16, "which then has no say"

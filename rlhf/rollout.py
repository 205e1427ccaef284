"""The rollout: completions of a batch of prompts with everything that one PPO update needs to know about them.

`collect` reads in the order of the algorithm: sample, score, measure under policy and reference, shape rewards,
estimate advantages. Shapes: B completions, T completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf import ops
from rlhf.actor_critic import TokenModel, TokenOutputs, passes_of
from rlhf.generation import Engine, Generated
from rlhf.micro_batches import partition
from rlhf.out_of_memory import Halving
from rlhf.scoring import Read, checked_scores
from rlhf.sequences import Sequences
from rlhf.statistics import distinct_n
from rlhf.trunk import Trunk
from rlhf.types import Prompt, RewardFn, TrunkReward


@dataclass(frozen=True)
class Shaping:
    """How scores and logprobs become advantages."""

    kl_coef: float
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float = 0.0
    rloo_samples: int | None = None


@dataclass(frozen=True)
class Rollout(Sequences):
    """Completions of one batch, measured by the policy that wrote them. Nothing in it carries a gradient."""

    finished: Tensor
    """(B,) whether the completion ended by itself."""
    scores: Tensor
    """(B,) what the reward function said."""
    logprobs: Tensor
    """(B, T) under the policy before the update: the old logprobs of the ratio."""
    ref_logprobs: Tensor
    sampler_logprobs: Tensor
    """(B, T) as the engine saw them while decoding; for comparison only."""
    entropy: Tensor
    values: Tensor
    rewards: Tensor
    """(B, T) -kl_coef * KL on every token, the score (less the penalty for a missing EOS) on the last."""
    advantages: Tensor
    """(B, T) whitened over all tokens of the batch and of all processes."""
    returns: Tensor
    prompts: tuple[Prompt, ...] = ()
    completions: tuple[str, ...] = ()

    @property
    def kl(self) -> Tensor:
        """(B,) k1 estimate of KL(policy || reference) of each sequence, in nats."""
        return ops.masked(ops.kl_k1(self.logprobs, self.ref_logprobs), self.completion_mask).sum(1)


def collect(
    *,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    reward: RewardFn,
    model: TokenModel,
    ref_model: TokenModel,
    shaping: Shaping,
    max_tokens: int,
    temperature: float,
    micro_batch_size: int,
    pad_token_id: int,
    generator: torch.Generator,
    device: torch.device | None = None,
    micro_batch_tokens: int | None = None,
    num_mini_batches: int = 1,
    halving: Halving | None = None,
    reduce: ops.Reduce = ops.alone,
    trunk: Trunk | None = None,
    trunk_reward: TrunkReward | None = None,
    together: Callable[[Callable[[], list[float]]], list[float]] = lambda scoring: scoring(),
    lap: Callable[[str], None] = lambda part: None,
) -> Rollout:
    """Sample one completion per prompt and prepare the update. Raises UserError for a reward that cannot be used.

    With `trunk`, the frozen lower layers run once, here, for both models, for the whole update, and for `trunk_reward`:
    the same reward, where it stands on that trunk. `together` runs the scoring: where one process fails, all must.
    `num_mini_batches` says into how many the update deals; `halving` is that of the whole run.
    `lap` is told of each part, `sample`, `score` and `measure` (in two pieces with a trunk), when it is over.
    """
    # 1. sample
    engine.sync()
    sampled = sample(engine, prompt_ids, max_tokens=max_tokens, temperature=temperature, generator=generator)
    engine.rest()
    sequences = Sequences.from_lists(prompt_ids, [s.ids for s in sampled], pad=pad_token_id).to(
        device or torch.device("cpu")
    )
    completions = tuple(decode(s.ids) for s in sampled)
    finished = torch.tensor([s.finished for s in sampled], device=device)
    lap("sample")
    # the very micro-batches that the update will forward
    micro_batches = partition(
        sequences, micro_batch_size, tokens=micro_batch_tokens, num_mini_batches=num_mini_batches, reduce=reduce
    )
    halving = halving or Halving.of_micro_batches(micro_batch_size, micro_batch_tokens)
    if trunk is not None:
        read = Read.of(trunk_reward, prompts, prompt_ids, completions, sampled) if trunk_reward else None
        below = partial(with_trunk_states, trunk, read.sequences.to(sequences.device) if read else sequences)
        whole = halving.in_parts(micro_batches, below)
        assert whole.trunk_states is not None
        sequences = replace(sequences, trunk_states=whole.trunk_states[:, : sequences.width - 1])
        reward = read.scored_by(trunk_reward, whole.trunk_states) if read and trunk_reward else reward
        lap("measure")
    # 2. score
    scores = torch.tensor(together(lambda: checked_scores(reward, prompts, completions)), device=device)
    lap("score")
    # 3. measure, 4. shape rewards and estimate advantages
    measured = measured_by(
        model,
        ref_model,
        sequences,
        finished=finished,
        scores=scores,
        shaping=shaping,
        micro_batches=micro_batches,
        halving=halving,
        reduce=reduce,
    )
    lap("measure")
    return Rollout(
        **vars(sequences),
        **measured,
        finished=finished,
        scores=scores,
        sampler_logprobs=_padded([s.logprobs for s in sampled]).to(measured["logprobs"]),
        prompts=tuple(prompts),
        completions=completions,
    )


def sample(
    engine: Engine,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[Generated]:
    """One completion per prompt. Where memory is short the engine decodes fewer rows together from then on.

    Every row has its own random numbers, so its completion stays the same.
    """
    rows, state = min(engine.batch_size, len(prompt_ids)), generator.get_state()
    halving = Halving("rollout_batch_size", rows)

    def attempt() -> list[Generated]:
        return engine.generate(prompt_ids, max_tokens=max_tokens, temperature=temperature, generator=generator)

    def undo() -> None:
        engine.batch_size = halving.now
        generator.set_state(state)

    return halving.retried(attempt, rows=rows, undo=undo)


def measured_by(
    model: TokenModel,
    ref_model: TokenModel,
    sequences: Sequences,
    *,
    finished: Tensor,
    scores: Tensor,
    shaping: Shaping,
    micro_batches: Sequence[Tensor],
    halving: Halving,
    reduce: ops.Reduce = ops.alone,
) -> dict[str, Tensor]:
    """What policy and reference make of the completions, and what follows from that: fields of `Rollout` by name."""

    def both(parts: list[Tensor]) -> tuple[TokenOutputs, TokenOutputs]:
        with passes_of(model):
            of_policy = measure(model, sequences, parts)
        return of_policy, measure(ref_model, sequences, parts)

    policy, reference = halving.in_parts(micro_batches, both)
    rewards, advantages, returns = advantages_of(
        sequences,
        scores=scores - shaping.missing_eos_penalty * (~finished),
        logprobs=policy.logprobs,
        ref_logprobs=reference.logprobs,
        values=policy.values,
        shaping=shaping,
        reduce=reduce,
    )
    return {
        "logprobs": policy.logprobs,
        "ref_logprobs": reference.logprobs,
        "entropy": policy.entropy,
        "values": policy.values,
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
    }


def measured_again(
    batch: Rollout,
    *,
    model: TokenModel,
    ref_model: TokenModel,
    shaping: Shaping,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    num_mini_batches: int,
    halving: Halving,
    reduce: ops.Reduce = ops.alone,
) -> Rollout:
    """The same completions and scores, measured anew by the same models: in the parts that `halving` has come to."""
    micro_batches = partition(
        batch, micro_batch_size, tokens=micro_batch_tokens, num_mini_batches=num_mini_batches, reduce=reduce
    )
    measured = measured_by(
        model,
        ref_model,
        batch,
        finished=batch.finished,
        scores=batch.scores,
        shaping=shaping,
        micro_batches=micro_batches,
        halving=halving,
        reduce=reduce,
    )
    return replace(batch, **measured)


def advantages_of(
    sequences: Sequences,
    *,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    shaping: Shaping,
    reduce: ops.Reduce = ops.alone,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token rewards, whitened advantages and returns, each (B, T)."""
    mask = sequences.completion_mask
    rewards = ops.shaped_rewards(
        scores=scores, kl=ops.kl_k1(logprobs, ref_logprobs), mask=mask, kl_coef=shaping.kl_coef
    )
    if shaping.whiten_rewards:  # the mean stays: taking it away would reward or punish length
        rewards = ops.whiten(rewards, mask, shift_mean=False, reduce=reduce)
    if shaping.rloo_samples is None:
        advantages, returns = ops.gae(rewards=rewards, values=values, mask=mask, gamma=shaping.gamma, lam=shaping.lam)
    else:
        of_sequence = ops.rloo_advantages(rewards.sum(1), shaping.rloo_samples)
        advantages = ops.masked(of_sequence[:, None].expand_as(rewards), mask)
        returns = advantages
    return rewards, ops.whiten(advantages, mask, reduce=reduce), returns


def with_trunk_states(trunk: Trunk, sequences: Sequences, micro_batches: Sequence[Tensor]) -> Sequences:
    """The same sequences with what the frozen lower layers make of them."""
    states: Tensor | None = None
    width = sequences.width - 1
    for rows in micro_batches:
        batch = sequences.select(rows)
        part = trunk.states(batch.model_inputs())
        if states is None:
            states = part.new_zeros(len(sequences), width, part.shape[-1])
        left = sequences.prompt_ids.shape[1] - batch.prompt_ids.shape[1]
        states[rows, left : left + part.shape[1]] = part
    return replace(sequences, trunk_states=states)


@torch.no_grad()
def measure(model: TokenModel, sequences: Sequences, micro_batches: Sequence[Tensor]) -> TokenOutputs:
    """Logprobs, entropy and values (B, T) of all sequences, 0 outside the completions, without gradient."""
    outputs: TokenOutputs | None = None
    for rows in micro_batches:
        batch = sequences.select(rows)
        measured = model(batch)
        if outputs is None:
            empty = torch.zeros(sequences.completion_ids.shape, dtype=measured.logprobs.dtype, device=rows.device)
            outputs = TokenOutputs(empty, empty.clone(), empty.clone())
        for whole, part in zip(outputs, measured, strict=True):
            whole[rows, : part.shape[1]] = ops.masked(part, batch.completion_mask)
    assert outputs is not None, "a rollout has at least one sequence"
    return outputs


def metrics(
    rollout: Rollout, *, kl_coef: float, reduce: ops.Reduce = ops.alone, gather: ops.Reduce = ops.alone
) -> dict[str, float]:
    """What a dashboard shows of a rollout, under the names of TRL's last PPO trainer where it had one.

    Over the sequences of all processes: `gather` joins their (B,) tensors, `reduce` sums. KL in nats per sequence;
    `objective/entropy` is the sequence's summed -logprob as in TRL, `policy/entropy_avg` the exact entropy per token.
    `gen/distinct2` is of this process's texts.
    """
    mask = rollout.completion_mask

    def token_mean(x: Tensor) -> Tensor:
        return ops.masked_mean(x, mask, reduce=reduce)

    def of_sequences(per_token: Tensor) -> Tensor:
        return gather(ops.masked(per_token, mask).sum(1).double())

    kl, k3 = gather(rollout.kl.double()), of_sequences(ops.kl_k3(rollout.logprobs, rollout.ref_logprobs))
    scores, lengths = gather(rollout.scores.double()), gather(rollout.completion_lengths.double())
    finished, distinct = gather(rollout.finished.double()), distinct_n(rollout.completions, 2)
    found: dict[str, Any] = {
        "objective/kl": kl.mean(),
        "objective/kl_k3": k3.mean(),
        "objective/kl_per_token": kl.sum() / lengths.sum(),
        "objective/kl_max_seq": kl.max(),
        "objective/entropy": -of_sequences(rollout.logprobs).mean(),
        "objective/non_score_reward": -kl_coef * kl.mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(unbiased=False),
        "objective/scores_p5": scores.quantile(0.05),
        "objective/scores_p95": scores.quantile(0.95),
        "objective/rlhf_reward": scores.mean() - kl_coef * kl.mean(),
        "policy/entropy_avg": token_mean(rollout.entropy),
        "returns/mean": token_mean(rollout.returns),
        "returns/var": ops.masked_var(rollout.returns, mask, reduce=reduce),
        "val/mean": token_mean(rollout.values),
        "val/var_explained": explained_variance(rollout.values, rollout.returns, mask, reduce=reduce),
        "val/num_eos_tokens": finished.sum(),
        "gen/eos_rate": finished.mean(),
        "gen/length_mean": lengths.mean(),
        "gen/length_p95": lengths.quantile(0.95),
        "gen/distinct2": 0.0 if math.isnan(distinct) else distinct,
        "gen/sampler_logprob_gap": token_mean(rollout.logprobs - rollout.sampler_logprobs),
    }
    return {name: float(value) for name, value in found.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, reduce: ops.Reduce = ops.alone) -> Tensor:
    """1 - mean squared error / variance of the returns, over the mask; 0 where the returns do not vary."""
    variance = ops.masked_var(returns, mask, reduce=reduce)
    error = ops.masked_mean((returns - values) ** 2, mask, reduce=reduce)
    return torch.where(variance > 0, 1 - error / variance, torch.zeros_like(variance))


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])

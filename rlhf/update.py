"""One PPO update: a rollout in, optimiser steps on policy and value out.

The loss is a sum over tokens divided by the tokens of an average minibatch, over micro-batches and processes, so that
every token weighs the same however the rollout was split (science.md section 2, environment A'). Not by the minibatch's
own tokens: micro-batches hold neighbours in length, and a token of the short ones would then weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rlhf import ops
from rlhf.actor_critic import ActorCritic, Part, TokenModel, TokenOutputs, one_by_one, passes_of
from rlhf.learner import Learner
from rlhf.losses import policy_loss, value_loss
from rlhf.micro_batches import deal, partition
from rlhf.out_of_memory import Halving
from rlhf.rollout import Rollout
from rlhf.sequences import Sequences

SAME_POLICY_TOLERANCE = 1e-5
"""Largest |log ratio| before the first optimiser step; more means that something changed besides the weights."""


@dataclass(frozen=True)
class UpdateSettings:
    """How a rollout is turned into optimiser steps."""

    num_ppo_epochs: int
    num_mini_batches: int
    micro_batch_size: int
    cliprange: float
    cliprange_value: float | None
    vf_coef: float
    max_grad_norm: float
    dual_clip: float | None = None
    target_kl: float | None = None
    ptx_coef: float = 0.0
    micro_batch_tokens: int | None = None
    """Bounds the micro-batches in place of `micro_batch_size`, where it is given."""


class TokenSums:
    """Running sums over tokens, so that a metric is the same for any split into micro-batches."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        """Of each quantity: its sum, and over how many tokens."""

    def add(self, mask: Tensor, **per_token: Tensor) -> None:
        """Add every quantity over the tokens of the mask."""
        for name, value in per_token.items():
            total = torch.stack([ops.masked(value.detach().double(), mask).sum(), mask.sum().double()])
            self.totals[name] = self.totals.get(name, torch.zeros_like(total)) + total

    def means(self, reduce: ops.Reduce) -> dict[str, float]:
        """Mean of every quantity over all tokens of all processes."""
        found = {name: reduce(total).tolist() for name, total in self.totals.items()}
        return {name: total / tokens for name, (total, tokens) in found.items()}


def _as_it_is(batch: Rollout) -> Rollout:
    return batch


def update(
    learner: Learner,
    batch: Rollout,
    *,
    settings: UpdateSettings,
    generator: torch.Generator,
    train_policy: bool = True,
    ptx_batches: Iterator[Sequences] | None = None,
    halving: Halving | None = None,
    measure_again: Callable[[Rollout], Rollout] = _as_it_is,
) -> dict[str, float]:
    """Run `num_ppo_epochs` over the rollout in minibatches; returns the metrics of the update.

    With `train_policy=False` only the value is fitted (warm-up). Raises RuntimeError when the first minibatch does not
    find the policy that wrote the rollout. Where memory is short, micro-batches are cut by `halving`, that of the run;
    in the first minibatch `measure_again` then gives the rollout in the same cut, so that the ratio is 1 in bf16 too.
    """
    reduce = reducer(learner.accelerator)
    micro_batches = partition(
        batch,
        settings.micro_batch_size,
        tokens=settings.micro_batch_tokens,
        num_mini_batches=settings.num_mini_batches,
        reduce=reduce,
    )
    halving = halving or Halving.of_micro_batches(settings.micro_batch_size, settings.micro_batch_tokens)
    num_mini_batches = min(settings.num_mini_batches, len(micro_batches))
    tokens = float(reduce(batch.completion_mask.sum())) / num_mini_batches
    sums, norms, skipped = TokenSums(), [], 0
    for epoch in range(settings.num_ppo_epochs):
        of_epoch = TokenSums()
        for number, group in enumerate(deal(micro_batches, settings.num_mini_batches, generator)):
            is_first = epoch == 0 and number == 0
            shown = next(ptx_batches) if ptx_batches is not None and train_policy else None
            add = partial(
                add_gradients,
                learner,
                group=group,
                shown=shown,
                settings=settings,
                tokens=tokens,
                train_policy=train_policy,
                sums=(sums, of_epoch),
                must_be_same_policy=train_policy and is_first,
                halving=halving,
            )
            batch = _within_memory(
                add,
                batch,
                rows=max(0 if shown is None else len(shown), *map(len, group)),
                learner=learner,
                sums=(sums, of_epoch),
                halving=halving,
                measure_again=measure_again if is_first else _as_it_is,
            )
            norm = optimizer_step(learner, settings.max_grad_norm)
            norms.append(norm)
            skipped += norm is None
        if settings.target_kl is not None and of_epoch.means(reduce)["approxkl"] > settings.target_kl:
            break
    return _update_metrics(sums.means(reduce), [n for n in norms if n is not None], skipped)


def add_gradients(
    learner: Learner,
    batch: Rollout,
    *,
    group: Sequence[Tensor],
    shown: Sequences | None,
    settings: UpdateSettings,
    tokens: float,
    train_policy: bool,
    sums: Sequence[TokenSums],
    must_be_same_policy: bool,
    halving: Halving,
) -> None:
    """Backward through the micro-batches of one minibatch, and through the demonstrations `shown` beside it."""
    accelerator = learner.accelerator
    parts = [part for rows in group for part in halving.parts(rows)]
    # accelerate's wrapper for several processes expects all gradients of a pass at once
    passes = one_by_one(learner.model) if accelerator.num_processes == 1 else ()
    with passes_of(learner.model):
        for position, rows in enumerate(parts):
            for only in passes or (None,):
                with _sync_only_last(learner, position, len(parts)):
                    loss = minibatch_loss(
                        learner.forward,
                        batch.select(rows),
                        settings=settings,
                        train_policy=train_policy,
                        sums=sums,
                        must_be_same_policy=must_be_same_policy,
                        only=only,
                    )
                    if train_policy or only != "policy":  # in the warm-up the policy is only measured
                        accelerator.backward(loss * accelerator.num_processes / tokens)
        if shown is None:
            return
        shown_to = partial(learner.forward, only="policy") if passes else learner.forward
        for rows in halving.parts(torch.arange(len(shown), device=shown.device)):
            part = shown.select(rows)
            share = part.completion_mask.sum() / shown.completion_mask.sum()
            accelerator.backward(settings.ptx_coef * (share * demonstration_loss(shown_to, part)))


def _within_memory(
    add: Callable[[Rollout], None],
    batch: Rollout,
    *,
    rows: int,
    learner: Learner,
    sums: Sequence[TokenSums],
    halving: Halving,
    measure_again: Callable[[Rollout], Rollout],
) -> Rollout:
    """Call `add`; where memory is short, again in smaller parts, once what it had added is taken back.

    Returns the rollout that the gradients are of. At most `rows` of its rows are computed together.
    """
    before = [dict(each.totals) for each in sums]

    def undo() -> None:
        nonlocal batch
        learner.optimizer.zero_grad(set_to_none=True)
        for each, totals in zip(sums, before, strict=True):
            each.totals = dict(totals)
        batch = measure_again(batch)

    halving.retried(lambda: add(batch), rows=rows, undo=undo)
    return batch


def minibatch_loss(
    model: TokenModel,
    batch: Rollout,
    *,
    settings: UpdateSettings,
    train_policy: bool,
    sums: Sequence[TokenSums],
    must_be_same_policy: bool,
    only: Part | None = None,
) -> Tensor:
    """Loss summed over the tokens of one micro-batch; the caller divides by the tokens of the optimiser batch.

    With `only` it is that of the policy or of the value, each in a pass of its own.
    """
    parted = partial(cast(ActorCritic, model), only=only) if only else model
    out = parted(batch, train_policy=train_policy)
    loss = torch.zeros((), device=out.values.device)
    if only != "value":
        of_policy = _policy_part(out, batch, settings, sums, must_be_same_policy=must_be_same_policy)
        loss = of_policy if train_policy else loss
    if only != "policy":
        loss = loss + settings.vf_coef * _value_part(out, batch, settings, sums)
    return loss


def _policy_part(
    out: TokenOutputs,
    batch: Rollout,
    settings: UpdateSettings,
    sums: Sequence[TokenSums],
    *,
    must_be_same_policy: bool,
) -> Tensor:
    mask = batch.completion_mask
    log_ratio = ops.masked(out.logprobs - batch.logprobs, mask)
    if must_be_same_policy:
        _check_same_policy(log_ratio)
    policy = policy_loss(
        logprobs=ops.masked(out.logprobs, mask),
        old_logprobs=batch.logprobs,
        advantages=batch.advantages,
        cliprange=settings.cliprange,
        dual_clip=settings.dual_clip,
    )
    ratio = log_ratio.exp()
    for collected in sums:
        collected.add(
            mask,
            policy_loss=policy.loss,
            approxkl=0.5 * log_ratio**2,
            clipped=policy.clipped,
            entropy=out.entropy,
            ratio=ratio,
            ratio_squared=ratio**2,
        )
    return ops.masked(policy.loss, mask).sum()


def _value_part(out: TokenOutputs, batch: Rollout, settings: UpdateSettings, sums: Sequence[TokenSums]) -> Tensor:
    mask = batch.completion_mask
    value = value_loss(
        values=ops.masked(out.values, mask),
        old_values=batch.values,
        returns=batch.returns,
        cliprange_value=settings.cliprange_value,
    )
    for collected in sums:
        collected.add(mask, value_loss=value.loss, value_clipped=value.clipped)
    return ops.masked(value.loss, mask).sum()


def demonstration_loss(model: TokenModel, batch: Sequences) -> Tensor:
    """Mean negative logprob of demonstrations: the pre-training mix (ptx) of Ouyang et al. 2022."""
    return -ops.masked_mean(model(batch).logprobs, batch.completion_mask)


def optimizer_step(learner: Learner, max_grad_norm: float) -> tuple[float, float] | None:
    """Clip, step and clear the gradients of policy and value; returns their norms, or None for a step that was skipped.

    A gradient that is not finite skips the step for both: one bad batch must not end in the weights.
    """
    clip = learner.accelerator.clip_grad_norm_
    parameters = (learner.model.policy_parameters(), learner.model.value_parameters())
    norms = [float(clip(p, max_grad_norm) or 0.0) if any(w.grad is not None for w in p) else 0.0 for p in parameters]
    finite = all(map(torch.isfinite, torch.tensor(norms)))
    if finite:
        learner.optimizer.step()
        learner.after_optimizer_step()
    learner.optimizer.zero_grad(set_to_none=True)
    return (norms[0], norms[1]) if finite else None


def reducer(accelerator: Any) -> ops.Reduce:
    """Sum over accelerate's processes."""
    return lambda total: accelerator.reduce(total, reduction="sum")


def _sync_only_last(learner: Learner, position: int, count: int) -> AbstractContextManager[Any]:
    """Processes exchange gradients once per optimiser step, with the last micro-batch."""
    return nullcontext() if position == count - 1 else learner.accelerator.no_sync(learner.forward)


def _check_same_policy(log_ratio: Tensor) -> None:
    gap = float(log_ratio.detach().abs().max())
    if gap > SAME_POLICY_TOLERANCE:
        raise RuntimeError(
            f"before the first optimiser step the policy's logprobs already differ from the rollout's by up to "
            f"{gap:.2e} (allowed: {SAME_POLICY_TOLERANCE:.0e}): something besides the weights changed, such as dropout"
        )


def _update_metrics(means: dict[str, float], norms: Sequence[tuple[float, float]], skipped: int) -> dict[str, float]:
    """Names of TRL's last PPO trainer where it had one."""
    count = max(len(norms), 1)
    return {
        "policy/approxkl_avg": means["approxkl"],
        "policy/clipfrac_avg": means["clipped"],
        "loss/policy_avg": means["policy_loss"],
        "loss/value_avg": means["value_loss"],
        "val/clipfrac_avg": means["value_clipped"],
        "val/ratio": means["ratio"],
        "val/ratio_var": max(means["ratio_squared"] - means["ratio"] ** 2, 0.0),
        "grad_norm/policy": sum(n[0] for n in norms) / count,
        "grad_norm/value": sum(n[1] for n in norms) / count,
        "val/skipped_steps": float(skipped),
    }

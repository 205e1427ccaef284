"""Mistakes that real PPO code has made, planted for the length of a `with` block: what each costs can be read off.

None of them is an option of the product; each replaces one name inside it. The first five say why the KL penalty is
k1 = log pi - log ref in the reward. All estimators agree, or nearly, on how large the KL is, but PPO follows gradients:

- in the reward, only E[k1 grad log pi] is the gradient of the KL; k2 and k3 give another, which hardly looks at the
  tokens that the policy likes better than the reference does, and punishes those that it gave up;
- in the loss, k1 has the gradient E[grad log pi] = 0 and is no penalty at all; k2 and k3 per token do not see what a
  token does to the KL of the tokens that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rlhf import ops, update
from rlhf.generation import plain
from rlhf.generation.plain import sample
from rlhf.losses import TokenLoss, policy_loss

Estimator = Callable[[Tensor, Tensor], Tensor]
Fault = Callable[[float], AbstractContextManager[Any]]
"""From beta to the block in which the fault is planted."""


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log ratio."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def in_reward(estimator: Estimator) -> Fault:
    """This estimator in the place of k1."""
    return lambda beta: patch.object(ops, "kl_k1", estimator)


def in_loss(estimator: Estimator) -> Fault:
    """No KL in the reward; instead beta times this estimator is added to the loss of every token, as GRPO does with k3.

    Advantages stay unwhitened here: whitening would scale the reward, but not the KL beside it, and so change beta.
    """

    @contextmanager
    def planted(beta: float) -> Iterator[None]:
        sound = update.minibatch_loss

        def with_kl(model: Any, batch: Any, **options: Any) -> Tensor:
            kl = estimator(model(batch).logprobs, batch.ref_logprobs)
            return sound(model, batch, **options) + beta * ops.masked(kl, batch.completion_mask).sum()

        with (
            patch.object(ops, "kl_k1", lambda logprobs, ref_logprobs: torch.zeros_like(logprobs)),
            patch.object(ops, "whiten", lambda x, mask, **options: ops.masked(x, mask)),
            patch.object(update, "minibatch_loss", with_kl),
        ):
            yield

    return planted


def sequence_mean(**arguments: Any) -> TokenLoss:
    """A policy loss in which every completion weighs the same, however long it is. Outside the mask logprobs are 0."""
    sound = policy_loss(**arguments)
    lengths = (arguments["old_logprobs"] != 0).sum(1, keepdim=True).clamp(min=1)
    return TokenLoss(sound.loss / lengths, sound.clipped)


def score_on_padding(*, scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The score one place after EOS, where the mask removes it."""
    return ops.masked(-kl_coef * kl, mask)


def top_3(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """A sampler of the three likeliest tokens, as a generation config left in place would do it."""
    third = logits.topk(3).values[:, -1:]
    return sample(logits.masked_fill(logits < third, -torch.inf), uniforms, temperature=temperature)


FAULTS: dict[str, Fault] = {
    "k2_in_reward": in_reward(k2),
    "k3_in_reward": in_reward(ops.kl_k3),
    "k1_in_loss": in_loss(ops.kl_k1),
    "k2_in_loss": in_loss(k2),
    "k3_in_loss": in_loss(ops.kl_k3),
    "kl_sign": in_reward(lambda logprobs, ref_logprobs: ref_logprobs - logprobs),
    "score_on_padding": lambda beta: patch.object(ops, "shaped_rewards", score_on_padding),
    "sequence_mean": lambda beta: patch.object(update, "policy_loss", sequence_mean),
    "sampled_top_3": lambda beta: patch.object(plain, "sample", top_3),
}

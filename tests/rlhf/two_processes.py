"""Started by `test_distributed.py`: short PPO runs on the tiny model, in as many processes as asked.

Every process writes what became of each run to `<root>/<run>/process_<rank>.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import patch_environment
from torch.distributed.tensor import DTensor

from rlhf import checkpoint, models, ppo, update
from rlhf.actor_critic import ValueHead, ValueModel
from rlhf.config import LastLayers, PPOConfig, PPOExtras, Tracking, Trainable
from rlhf.types import Prompt

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
PROMPTS = ("hello", "the film was", "a b c", "one of the best films of the year is", "not a")
EVEN: dict[str, Any] = {"batch_size": 16, "total_episodes": 64, "micro_batch_size": 4}


@dataclass(frozen=True)
class Run:
    """One call of `ppo.train`; `fault` is planted in it, and `again` repeats it without."""

    trainable: Trainable = "full"
    separate: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    prompts: Sequence[Prompt] = PROMPTS
    fault: Callable[[ExitStack], None] | None = None
    again: bool = False


def vowels(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """A reward that needs no model."""
    return [5 * sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


REWARD = {"given": vowels}
"""What `ppo.train` is given; faults put another one here."""

# ---------------------------------------------------------------- what goes wrong in one process only


def in_second_rollout(rank: int, action: Callable[[], list[float]]) -> Callable[[ExitStack], None]:
    """The second time that this process asks for the reward, `action` happens first, or gives the scores."""

    def plant(stack: ExitStack) -> None:
        calls: list[int] = []

        def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
            calls.append(1)
            special = action() if rank == RANK and len(calls) == 2 else []
            return special or vowels(prompts, completions)

        stack.enter_context(patch.dict(REWARD, given=reward))

    return plant


def fails() -> list[float]:
    """A reward that breaks down."""
    raise ValueError("the server is gone")


def asked_to_stop() -> list[float]:
    """SIGTERM reaches this process alone."""
    os.kill(os.getpid(), signal.SIGTERM)
    return []


def gradient_of_one_micro_batch_is_nan(stack: ExitStack) -> None:
    """In the second process, once."""
    calls: list[int] = []
    sound = update.minibatch_loss

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return sound(*args, **options) * (float("nan") if RANK == 1 and len(calls) == 7 else 1.0)

    stack.enter_context(patch.object(update, "minibatch_loss", loss))


def disk_is_full(stack: ExitStack) -> None:
    """Where the first process would write a checkpoint."""

    def save(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    stack.enter_context(patch.object(checkpoint, "save", save))


# ---------------------------------------------------------------- the runs

COMPARED = {
    "full": Run(),
    "last_layers": Run(LastLayers(1), settings={"total_episodes": 48}),
    "lora": Run("lora", separate=True, settings={"total_episodes": 48, "extras": PPOExtras(ema_decay=0.5)}),
}
"""Also run in one process, and with sharded weights."""

SHARED = {
    **COMPARED,
    "stopped": Run(fault=in_second_rollout(1, asked_to_stop), again=True),
    "nan_gradient": Run(fault=gradient_of_one_micro_batch_is_nan),
}
"""Run with whole and with sharded weights."""

ONCE = {
    "short": Run(
        settings={"batch_size": 10, "total_episodes": 20, "micro_batch_size": 3, "num_mini_batches": 3}
        | {"max_prompt_tokens": 6, "max_completion_tokens": 1},
        prompts=("hi", "one of the best films of the year is", "The script isn't. I laughed twice"),
    ),
    "few_micro_batches": Run(settings={"batch_size": 8, "total_episodes": 16, "num_mini_batches": 2}),
    "target_kl": Run(
        settings={"total_episodes": 32, "num_mini_batches": 2, "value_warmup_steps": 0}
        | {"extras": PPOExtras(target_kl=1e-12)}
    ),
    "reward_fails": Run(fault=in_second_rollout(1, fails)),
    "score_is_nan": Run(fault=in_second_rollout(0, lambda: [float("nan")] * 8)),
    "disk_full": Run(fault=disk_is_full),
    "odd_batch": Run(settings={"batch_size": 15}),
    "split_groups": Run(settings={"batch_size": 12, "extras": PPOExtras(rloo_samples=4)}),
}


def config_of(run: Run, output: Path) -> PPOConfig:
    """Small, in fp32, with one optimiser batch a rollout: how more are dealt depends on the number of processes."""
    settings: dict[str, Any] = {
        "num_mini_batches": 1,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "value_warmup_steps": 1,
        "kl_target": 1.0,
        "max_prompt_tokens": 32,
        "max_completion_tokens": 10,
    }
    return PPOConfig(
        output=str(output), precision="fp32", tracking=Tracking(wandb="off"), **(EVEN | settings | run.settings)
    )


def perform(model: str, run: Run, output: Path) -> dict[str, Any]:
    """Train and tell what happened in this process."""
    config = config_of(run, output)
    told: dict[str, Any] = {"world": 1, "steps": 0, "norms": []}
    torch.manual_seed(RANK)  # a new adapter is random: the first process's counts
    tokenizer = models.load_tokenizer(model)
    policy = models.load_policy(model, tokenizer, trainable=run.trainable)
    value = None
    if run.separate:
        backbone = models.trainable_copy(policy).get_base_model().base_model
        value = ValueModel(backbone, ValueHead(policy.config.hidden_size))
    sound = update.optimizer_step

    def step(learner: Any, *args: Any) -> Any:
        told["steps"] += 1
        weights = [*learner.model.policy_parameters(), *learner.model.value_parameters()]
        told["sharded"] = [isinstance(w, DTensor) and w.to_local().numel() < w.numel() for w in weights]
        told["gradients_sharded"] = [isinstance(w.grad, DTensor) for w in weights if w.grad is not None]
        told["norms"].append(sound(learner, *args))
        return told["norms"][-1]

    with ExitStack() as stack:
        stack.enter_context(patch.object(update, "optimizer_step", step))
        if run.fault:
            run.fault(stack)
        try:
            result = ppo.train(
                config, policy=policy, tokenizer=tokenizer, reward=REWARD["given"], prompts=run.prompts, value=value
            )
            told["whole"] = not any(isinstance(weight, DTensor) for weight in result.policy.parameters())
        except BaseException as error:
            told |= {"error": type(error).__name__, "message": str(error)}
    if torch.distributed.is_initialized():
        told["world"] = torch.distributed.get_world_size()
    return told


def main(model: str, root: str, sharded: str) -> None:
    """Everything that this number of processes is asked; `sharded` is the environment that accelerate sets for FSDP."""
    runs = COMPARED if WORLD == 1 else SHARED | ONCE
    todo = [(name, run, {}) for name, run in runs.items()]
    if WORLD > 1:
        todo += [(f"{name}_sharded", run, json.loads(sharded)) for name, run in SHARED.items()]
    for name, run, environment in todo:
        output = Path(root) / name
        with patch_environment(**environment):
            told = [perform(model, run, output)]
            if run.again:
                if RANK == 0:
                    shutil.copytree(output, output.with_name(f"{name}_halfway"))
                told.append(perform(model, Run(run.trainable, run.separate, run.settings, run.prompts), output))
        output.mkdir(parents=True, exist_ok=True)
        (output / f"process_{RANK}.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The smallest world that PPO runs in: random models of two layers over 384 tokens, ragged prompts, made-up scores."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf import models
from rlhf.actor_critic import ActorCritic, ValueHead, ValueModel
from rlhf.config import PPOConfig, Tracking
from rlhf.generation import Generated
from rlhf.learner import Learner
from rlhf.rollout import Rollout, Shaping, collect
from rlhf.update import UpdateSettings
from tests.rlhf import tiny

PAD, EOS = 0, 1
OFF = Tracking(wandb="off")
PROMPTS = [[5], [6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17], [18, 19, 20], [21], [22, 23], [24, 25, 26]]
COMPLETIONS = [[30, 31, EOS], [32, EOS], [33, 34, 35, 36, 37], [EOS], [38, 39, EOS], [40, 0, 41, EOS], [42], [43, EOS]]
"""Ragged; prompt and completion hold the pad id as ordinary text, and two completions are cut off."""
SCORES = [1.0, -0.5, 0.0, 2.0, -1.0, 0.25, 0.5, -2.0]
TEXTS = (
    "the film is good",
    "a dull film",
    "it is not",
    "one of the best films of the year",
    "The cast is great",
    "warm",
)
"""Prompts that the tokenizer of `tests/conftest.py` knows."""


class Scripted:
    """An engine that has decided in advance."""

    def __init__(self, completions: Sequence[list[int]] = COMPLETIONS) -> None:
        self.completions = completions
        self.batch_size = len(completions)

    def sync(self) -> None:
        """Nothing to take over."""

    def rest(self) -> None:
        """Nothing to give up."""

    def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[Generated]:
        """These completions, whatever the prompts are."""
        assert len(prompts) == len(self.completions)
        return [Generated(list(ids), [0.0] * len(ids), ids[-1] == EOS) for ids in self.completions]


def actor_critic(
    name: str = "llama", *, value: bool = True, critic: bool = False, temperature: float = 1.0, **changes: Any
) -> ActorCritic:
    """A tiny model with a value head that says something, on a trunk of its own for a `critic`, in fp32."""
    policy = tiny.build(name, **changes)
    head = ValueHead(policy.get_output_embeddings().weight.shape[1]) if value else None
    if head is not None:
        torch.nn.init.normal_(head.linear.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    of_value = ValueModel(tiny.build(name, **changes).base_model, head) if critic and head else head
    return ActorCritic(policy, of_value, temperature=temperature, dtype=torch.float32)


def reference(model: ActorCritic, *, seed: int = 5) -> ActorCritic:
    """A reference some way off: the policy as it was before it learned."""
    policy = copy.deepcopy(model.policy).requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=random)
    return ActorCritic(policy, None, temperature=model.temperature, dtype=torch.float32)


def gathered(model: Any, ref_model: Any, *, micro_batch_size: int = 4, **changes: Any) -> Rollout:
    """A rollout of the scripted completions, through `collect`."""
    wanted: dict[str, Any] = {
        "prompts": [f"prompt {i}" for i in range(len(PROMPTS))],
        "prompt_ids": PROMPTS,
        "engine": Scripted(),
        "decode": str,
        "reward": lambda prompts, completions: SCORES,
        "shaping": Shaping(kl_coef=0.1, missing_eos_penalty=1.0),
        "max_tokens": 5,
        "temperature": 1.0,
        "pad_token_id": PAD,
        "generator": torch.Generator(),
    }
    return collect(model=model, ref_model=ref_model, micro_batch_size=micro_batch_size, **(wanted | changes))


def learner(model: ActorCritic, **changes: Any) -> Learner:
    """The model with its optimiser, at a large step."""
    wanted: dict[str, Any] = {"learning_rate": 1e-3, "value_learning_rate": 1e-3, "steps": 10}
    return Learner(model, accelerator=Accelerator(mixed_precision="no", cpu=True), **(wanted | changes))


def settings(**changes: Any) -> UpdateSettings:
    """One epoch, one minibatch, everything else as in the field."""
    wanted: dict[str, Any] = {
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "micro_batch_size": 4,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "max_grad_norm": 1.0,
    }
    return UpdateSettings(**(wanted | changes))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight as it is now."""
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def same(before: dict[str, Tensor], module: torch.nn.Module) -> bool:
    """Whether every weight is still the same, to the bit."""
    return all(torch.equal(before[name], weight) for name, weight in module.named_parameters())


# ---------------------------------------------------------------- whole runs


def config(output: Path, **changes: Any) -> PPOConfig:
    """Four steps of eight completions, in seconds."""
    wanted: dict[str, Any] = {
        "total_episodes": 32,
        "batch_size": 8,
        "num_mini_batches": 2,
        "micro_batch_size": 3,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "value_warmup_steps": 1,
        "max_completion_tokens": 5,
        "rollout_batch_size": 8,
        "save_every": 1,
        "precision": "fp32",
        "tracking": OFF,
    }
    return PPOConfig(output=str(output), **(wanted | changes))


def length_reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Something to learn that depends on the text alone."""
    return [float("e" in completion) - 0.1 * len(completion) for completion in completions]


def policy(folder: Path, tokenizer: Any, trainable: Any = "full") -> Any:
    """A fresh copy of the tiny model."""
    return models.load_policy(str(folder), tokenizer, trainable=trainable)


def records(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("timing/")} for line in lines]

"""Started by `test_distributed.py`: a short PPO run on the tiny model, in as many processes as asked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf import models, ppo
from rlhf.config import PPOConfig, Tracking
from rlhf.types import Prompt


def vowels(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """A reward that needs no model."""
    return [5 * sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main(model: str, output: str, world: str) -> None:
    """Train and say how many processes there really were."""
    tokenizer = models.load_tokenizer(model)
    policy = models.load_policy(model, tokenizer, trainable="full")
    config = PPOConfig(
        output=output,
        total_episodes=64,
        batch_size=16,
        micro_batch_size=4,
        num_mini_batches=1,  # one optimiser batch a rollout: how it is dealt depends on the number of processes
        num_ppo_epochs=2,
        learning_rate=1e-3,
        value_warmup_steps=1,
        kl_target=1.0,
        max_prompt_tokens=32,
        max_completion_tokens=10,
        precision="fp32",
        tracking=Tracking(wandb="off"),
    )
    prompts: list[Prompt] = ["hello", "the film was", "a b c", "one of the best films of the year is", "not a"]
    ppo.train(config, policy=policy, tokenizer=tokenizer, reward=vowels, prompts=prompts)
    there = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    assert there == int(world), f"{there} processes, not {world}"
    if int(os.environ.get("RANK", "0")) == 0:
        (Path(output) / "world.json").write_text(json.dumps({"world": there}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

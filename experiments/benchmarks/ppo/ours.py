"""One run of our PPO on a prepared load: seconds of each step and the peak memory, as JSON on the last line."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from experiments.benchmarks.ppo.memory import forget_peak, megabytes
from reward_models.model import RewardModel
from rlhf import models, ppo
from rlhf.actor_critic import ValueModel
from rlhf.config import LastLayers, Lora, PPOConfig, Tracking, Trainable
from rlhf.memory import keep_freed_memory
from rlhf.run_folder import read_records


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--value", choices=("head", "separate"), default="head")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--last_layers", type=int, help="train these only; all without it")
    trained.add_argument("--lora", action="store_true", help="train adapters only")
    for name in ("steps", "batch", "micro_batch", "tokens", "epochs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--fixed", action="store_true", help="no token ends a completion")
    given = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()  # as `rlhf ppo` does
    forget_peak()
    before = megabytes("VmRSS")
    with tempfile.TemporaryDirectory() as output:
        seconds = _train(given, Path(output))
    print(json.dumps({"seconds": seconds, "peak_mb": megabytes("VmHWM") - before}))


def _trainable(given: argparse.Namespace) -> Trainable:
    if given.lora:
        return Lora()
    return LastLayers(given.last_layers) if given.last_layers else "full"


def _train(given: argparse.Namespace, output: Path) -> list[float]:
    rows = json.loads((given.folder / "prompts.json").read_text(encoding="utf-8"))
    trainable = _trainable(given)
    tokenizer = models.load_tokenizer(str(given.folder / "policy"))
    policy = models.load_policy(str(given.folder / "policy"), tokenizer, trainable=trainable)
    reward = RewardModel.load(given.folder / "reward")
    if given.last_layers:  # as if it had been trained with the same layers frozen
        reward.contract = models.model_contract(policy, tokenizer, max_prompt_tokens=1024, max_completion_tokens=1024)
    value = None
    if given.value == "separate":
        critic = models.load_classifier(str(given.folder / "reward"), tokenizer, trainable=trainable)
        value = ValueModel.from_classifier(critic)
    if given.fixed:
        models.eos_token_ids = lambda model, tokenizer: ()
    config = PPOConfig(
        output=str(output),
        trainable=trainable,
        value=given.value,
        total_episodes=given.steps * given.batch,
        batch_size=given.batch,
        num_mini_batches=1,
        micro_batch_size=given.micro_batch,
        num_ppo_epochs=given.epochs,
        learning_rate=1e-6,
        value_warmup_steps=0,
        max_prompt_tokens=1024,
        max_completion_tokens=given.tokens,
        missing_eos_penalty=0.0,
        rollout_batch_size=given.batch,
        save_every=10**6,
        held_out=0.0,
        tracking=Tracking(wandb="off"),
    )
    ppo.train(
        config, policy=policy, tokenizer=tokenizer, reward=reward, prompts=[row["prompt"] for row in rows], value=value
    )
    return [given.batch / row["timing/eps"] for row in read_records(output / "metrics.jsonl")]


if __name__ == "__main__":
    main()

"""One table of `scaling`: PPO steps of growing size, timed by their parts, as a JSON list on the last line."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.ppo.memory import forget_peak, megabytes
from experiments.benchmarks.scaling import AT_REST, PARTS
from reward_models.model import RewardModel
from rlhf import models, ppo
from rlhf.config import LastLayers, PPOConfig, Tracking
from rlhf.generation import Engine, Generated
from rlhf.memory import keep_freed_memory
from rlhf.progress import quiet, say

MICRO_BATCH = 8
DECODED_TOGETHER = 128


class TimedEngine:
    """An engine that says how long it took, what it copies of the policy included."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.batch_size = engine, engine.batch_size
        self.seconds = 0.0

    def generate(self, prompts: Sequence[Sequence[int]], **how: Any) -> list[Generated]:
        started = time.perf_counter()
        found = self.engine.generate(prompts, **how)
        self.seconds += time.perf_counter() - started
        return found

    def sync(self) -> None:
        started = time.perf_counter()
        self.engine.sync()
        self.seconds += time.perf_counter() - started

    def rest(self) -> None:
        self.engine.rest()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("grows", choices=tuple(AT_REST))
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--limit", type=float, required=True)
    for name in ("steps", "epochs", "last_layers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(2)
    keep_freed_memory()  # as `rlhf ppo` does
    models.eos_token_ids = lambda model, tokenizer: ()
    print(json.dumps(_table(given)))


def _table(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Sizes as long as the next is expected to end within the limit."""
    forget_peak()
    before = megabytes("VmRSS")
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    taken: list[float] = []
    for size in given.sizes:
        spent = time.perf_counter() - begun
        if spent + expected(taken) > given.limit:
            say(f"  {given.grows} {size} is left out: it would exceed {given.limit:.0f} s")
            break
        gc.collect()  # the models of the last size
        forget_peak()
        row = {"size": size} | _measure(given, AT_REST | {given.grows: size})
        rows.append(row | {"peak_mb": megabytes("VmHWM") - before})
        taken.append(time.perf_counter() - begun - spent)
        say(f"  {given.grows} {size}: {row['step']:.1f} s a step")
    return rows


def expected(taken: Sequence[float]) -> float:
    """Seconds of the next size, which is twice the last: it grows as that did, and at least doubles."""
    if not taken:
        return 0.0
    growth = taken[-1] / taken[-2] if len(taken) > 1 else 2.0
    return taken[-1] * max(growth, 2.0)


def _measure(given: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
    """Median seconds of each part of a step, and its tokens, prompts included."""
    with tempfile.TemporaryDirectory() as output:
        task, tokens = _task(given, sizes, output)
        timed = [_step(task, number) for number in range(given.steps)][1:]
    parts = {part: statistics.median(step[part] for step in timed) for part in PARTS}
    return parts | {"step": statistics.median(sum(step.values()) for step in timed), "tokens": tokens}


def _step(task: Any, number: int) -> dict[str, float]:
    """Seconds of sampling, measuring and updating."""
    task.engine.seconds = 0.0
    started = time.perf_counter()
    batch = task.rollout(number, kl_coef=task.config.kl_coef)
    rolled = time.perf_counter()
    task.update(number, batch, kl_coef=task.config.kl_coef)
    updated = time.perf_counter()
    sampling = task.engine.seconds
    return {"sampling": sampling, "measuring": rolled - started - sampling, "updating": updated - rolled}


def _task(given: argparse.Namespace, sizes: dict[str, int], output: str) -> tuple[Any, int]:
    """The parts of a PPO run whose every step takes all prompts, and the tokens of a step."""
    rows = json.loads((given.folder / "prompts.json").read_text(encoding="utf-8"))[: sizes["batch"]]
    rows = [row for row in rows for _ in range(sizes["samples_per_prompt"])]
    trainable = LastLayers(given.last_layers) if given.last_layers else "full"
    tokenizer = models.load_tokenizer(str(given.folder / "policy"))
    policy = models.load_policy(str(given.folder / "policy"), tokenizer, trainable=trainable)
    reward = RewardModel.load(given.folder / "reward")
    if given.last_layers:  # as if it had been trained with the same layers frozen
        reward.contract = models.model_contract(policy, tokenizer, max_prompt_tokens=1024, max_completion_tokens=1024)
    config = PPOConfig(
        output=output,
        trainable=trainable,
        total_episodes=given.steps * len(rows),
        batch_size=len(rows),
        num_mini_batches=1,
        micro_batch_size=MICRO_BATCH,
        num_ppo_epochs=given.epochs,
        learning_rate=1e-6,
        value_warmup_steps=0,
        max_prompt_tokens=1024,
        max_completion_tokens=sizes["tokens"],
        missing_eos_penalty=0.0,
        rollout_batch_size=DECODED_TOGETHER,
        held_out=0.0,
        tracking=Tracking(wandb="off"),
    )
    prompts = [row["prompt"] for row in rows]
    task = ppo.Task(config, policy=policy, tokenizer=tokenizer, reward=reward, prompts=prompts, value=None)
    task.engine = TimedEngine(task.engine)  # pyright: ignore[reportAttributeAccessIssue]
    return task, sum(len(row["ids"]) + sizes["tokens"] for row in rows)


if __name__ == "__main__":
    main()

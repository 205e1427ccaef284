"""Runs that are killed: `python -m tests.rlhf.broken_runs ROOT CASE...` runs each case in a process that dies.

One process imports torch, and forks for each case: what dies by SIGKILL has had no chance to tidy up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf import checkpoint, models, ppo, sft
from rlhf.actor_critic import ValueModel
from rlhf.config import LastLayers, PPOExtras, SFTConfig
from rlhf.types import Demonstration
from tests.conftest import make_tokenizer
from tests.rlhf import ppo_world as world

STEPS, SAVE_EVERY = 5, 2
CASES: dict[str, dict[str, Any]] = {
    "full": {"kl_target": 0.5, "kl_horizon": 100, "extras": {"ema_decay": 0.9}},
    "lora": {"trainable": "lora", "kl_target": 0.5, "kl_horizon": 100, "value": "separate"},
    "last_layers": {"trainable": LastLayers(1), "extras": {"ema_decay": 0.5, "ptx_coef": 0.5}},
    "head": {"trainable": "head", "whiten_rewards": True, "schedule": "constant"},
    "rloo": {"extras": {"rloo_samples": 2, "target_kl": 0.001}, "batch_size": 6, "total_episodes": 30},
}
Reward = Callable[[Sequence[Any], Sequence[str]], list[float]]


def noisy_reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Draws from every global stream of random numbers, which a resumed run must therefore find where they were."""
    noise = [random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)) + float(torch.randn(())) for _ in completions]
    return [score + n for score, n in zip(world.length_reward(prompts, completions), noise, strict=True)]


def train(case: str, root: Path, output: Path, reward: Reward = noisy_reward) -> ppo.PPOResult:
    """One run of this case on the model in `root`, from the start or from where it was left."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    options = dict(CASES[case])
    trainable, extras = options.get("trainable", "full"), options.pop("extras", {})
    if "ptx_coef" in extras:
        extras = extras | {"ptx_data": str(demonstrations(root))}
    tokenizer = make_tokenizer()
    value = None
    if options.get("value") == "separate":
        classifier = models.load_classifier(str(root / "model"), tokenizer, trainable=trainable, seed=1)
        value = ValueModel.from_classifier(classifier)
    wanted: dict[str, Any] = {"total_episodes": 8 * STEPS, "save_every": SAVE_EVERY, "held_out": 0.0}
    return ppo.train(
        world.config(output, extras=PPOExtras(**extras), **(wanted | options)),
        policy=world.policy(root / "model", tokenizer, trainable),
        tokenizer=tokenizer,
        reward=reward,
        prompts=world.TEXTS,
        value=value,
    )


def fine_tune(trainable: Any, root: Path, output: Path, kill_at: int | None = None) -> sft.SFTResult:
    """Six steps of fine-tuning with dropout on, killed at one of its forward passes if wanted."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    tokenizer = make_tokenizer()
    policy = world.policy(root / "model", tokenizer, trainable)
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    calls = iter(range(1000))
    if kill_at is not None:
        policy.register_forward_pre_hook(lambda *_: kill() if next(calls) == kill_at else None)
    texts = [
        ("the film is ", "good"),
        ("a ", "dull film"),
        ("it is ", "not funny and too long"),
        ("one of the ", "best"),
    ]
    return sft.train(
        SFTConfig(
            output=str(output),
            trainable=trainable,
            epochs=3,
            batch_size=4,
            micro_batch_size=2,
            learning_rate=1e-2,
            log_every=1,
            save_every=2,
            max_completion_tokens=6,
            precision="fp32",
            tracking=world.OFF,
        ),
        policy=policy,
        tokenizer=tokenizer,
        training=[Demonstration(prompt, completion) for prompt, completion in texts * 2],
        held_out=[Demonstration("the film ", "is warm")],
    )


def demonstrations(root: Path) -> Path:
    """A file of two."""
    path = root / "demonstrations.jsonl"
    rows = [{"prompt": "the film is ", "completion": "good"}, {"prompt": "a film ", "completion": "of warm"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def at_rollout(number: int, action: Callable[[], Any]) -> Reward:
    """The noisy reward, which does something at one of its calls."""
    calls = iter(range(1000))

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        if next(calls) == number:
            action()
        return noisy_reward(prompts, completions)

    return reward


def kill(signum: int = signal.SIGKILL) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), signum)


def dies(action: Callable[[], Any]) -> int:
    """Run it in a fork; returns how that ended: minus the signal, or the exit status."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
        try:
            action()
        except KeyboardInterrupt as stopped:
            print(stopped, flush=True)
            os._exit(getattr(stopped, "status", 130))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def break_off(case: str, root: Path) -> int:
    """`full` is killed in a rollout; `full@writing` while it writes a checkpoint, `full@SIGTERM` is asked to stop."""
    name, _, how = case.partition("@")
    output = root / case
    if name == "sft":
        return dies(lambda: fine_tune(how, root, output, kill_at=9))
    if how == "writing":
        seal, saves = checkpoint.seal, iter(range(1000))
        checkpoint.seal = lambda folder: kill() if next(saves) == 1 else seal(folder)  # type: ignore[assignment]
        try:
            return dies(lambda: train(name, root, output))
        finally:
            checkpoint.seal = seal
    if how == "twice":
        return dies(lambda: train(name, root, output, at_rollout(2, lambda: [kill(signal.SIGINT) for _ in range(2)])))
    if how:
        return dies(lambda: train(name, root, output, at_rollout(2, lambda: kill(getattr(signal, how)))))
    return dies(lambda: train(name, root, output, at_rollout(3, kill)))


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    import trl.trainer.sft_trainer  # noqa: F401

    for kind in ("full", "lora"):  # once, before the forks: what a child imports is lost with it
        models.load_classifier(str(folder / "model"), make_tokenizer(), trainable=kind)
    print(json.dumps({case: break_off(case, folder) for case in cases}))

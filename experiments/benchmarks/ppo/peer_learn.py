"""TRL's last PPO trainer optimises the reward model of a finished run, in its own environment.

It knows nothing of this project: run it as a file, with the peer's Python and the `task.json` that `equal_samples`
writes. `--check` prints TRL's scores of the task's texts as JSON; without it, the trained policy is left in a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402  # pyright: ignore[reportMissingImports]
from trl.experimental.utils import get_reward  # noqa: E402  # pyright: ignore[reportMissingImports]

DECODED_TOGETHER = 32
"""Sequences. It holds all logits of a rollout besides, so that more of them only cost memory."""
Task = dict[str, Any]


class Progress(TrainerCallback):
    """A line for each step, and all its metrics in a file."""

    def __init__(self, file: Path, steps: int) -> None:
        self.file, self.steps = file, steps

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if not logs or "objective/scores" not in logs:
            return
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        score, kl = (
            logs["objective/scores"],
            logs["objective/kl"],
        )  # TRL's score has the penalty for a missing EOS in it
        print(f"  step {state.global_step} of {self.steps}: penalised score {score:.3f}, KL {kl:.2f}", file=sys.stderr)


def main() -> None:
    """Check or train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path)
    parser.add_argument("--check", action="store_true", help="score the task's texts, and train nothing")
    parser.add_argument("--output", type=Path, help="gets `model` and `metrics.jsonl`")
    parser.add_argument("--learning_rate", type=float)
    given = parser.parse_args()
    torch.set_num_threads(2)
    task = json.loads(given.task.read_text(encoding="utf-8"))
    if given.check:
        print(json.dumps(check(task)))
    else:
        learn(task, given.output, given.learning_rate)


def check(task: Task) -> list[float]:
    """TRL's own scores of `task["checked"]`, padded as in a rollout: prompts on the left, completions on the right."""
    tokenizer = AutoTokenizer.from_pretrained(task["policy"])
    rows = task["checked"]
    prompts = _padded([row["prompt"] for row in rows], tokenizer.pad_token_id, left=True)
    completions = _padded([row["completion"] for row in rows], tokenizer.pad_token_id, left=False)
    reward = reward_model(task["reward"], tokenizer.eos_token_id).eval()
    with torch.no_grad():
        joined = torch.cat([prompts, completions], 1)
        _, scores, _ = get_reward(reward, joined, tokenizer.pad_token_id, prompts.shape[1])
    return scores.tolist()


def _padded(rows: list[list[int]], pad: int, *, left: bool) -> Tensor:
    width = max(map(len, rows))
    blanks = [[pad] * (width - len(row)) for row in rows]
    return torch.tensor([blank + row if left else row + blank for row, blank in zip(rows, blanks, strict=True)])


def reward_model(folder: str, eos: int) -> nn.Module:
    """The run's classifier, reading the text and giving the scores that our PPO has of it."""
    classifier = calibrated(folder)
    classifier.base_model.register_forward_pre_hook(partial(_end_with, eos), with_kwargs=True)
    return classifier


def calibrated(folder: str) -> Any:
    """The classifier with (raw - score_mean) / score_std as its output: the calibration goes into its last layer."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    mean, std = classifier.config.score_mean, classifier.config.score_std
    head = nn.Linear(classifier.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(classifier.score.weight / std)
        head.bias.fill_(-mean / std)
    classifier.score = head
    return classifier


def _end_with(eos: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let every text end with EOS, where it is scored: one that was cut off ends with another token."""
    ids, mask = kwargs["input_ids"].clone(), kwargs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    ids[torch.arange(len(ids)), last] = eos
    return args, kwargs | {"input_ids": ids}


def learn(task: Task, output: Path, learning_rate: float) -> None:
    """Train; `output/model` is there only when it is whole."""
    output.mkdir(parents=True, exist_ok=True)
    metrics = output / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(task["policy"], padding_side="left")
    steps = task["total_episodes"] // task["batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(task, tokenizer, scratch, learning_rate, Progress(metrics, steps))
        trainer.train()
    partial_folder = output / "model.partial"
    trainer.policy_model.save_pretrained(partial_folder)
    tokenizer.save_pretrained(partial_folder)
    partial_folder.rename(output / "model")


def _trainer(task: Task, tokenizer: Any, scratch: str, learning_rate: float, progress: Progress) -> PPOTrainer:
    policy, ref_policy = (AutoModelForCausalLM.from_pretrained(task["policy"], dtype=torch.float32) for _ in range(2))
    return PPOTrainer(
        args=_arguments(task, scratch, learning_rate),
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model(task["reward"], tokenizer.eos_token_id),
        value_model=calibrated(task["reward"]),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in task["prompts"]]),
        callbacks=[progress],
    )


def _arguments(task: Task, scratch: str, learning_rate: float) -> PPOConfig:
    """Ours where TRL has the setting; its defaults elsewhere.

    Its accumulation counts micro-batches over a whole epoch of the batch: with more than one, it would step once an
    epoch, however many minibatches there are. So there is one, which the trainer cuts to a minibatch.
    """
    return PPOConfig(
        **task["same"],
        output_dir=scratch,
        use_cpu=True,
        bf16=task["bf16"],
        gradient_checkpointing=False,
        per_device_train_batch_size=task["batch_size"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=min(task["batch_size"], DECODED_TOGETHER),
        total_episodes=task["total_episodes"],
        response_length=task["max_completion_tokens"],
        stop_token="eos",
        kl_estimator="k1",
        learning_rate=learning_rate,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )


if __name__ == "__main__":
    main()

"""One run of TRL's last PPO trainer on a prepared load, in its own environment: the same JSON as `ours`.

It knows nothing of this project: run it as a file, with the peer's Python.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from memory import forget_peak, megabytes  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402  # pyright: ignore[reportMissingImports]


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_, **__) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_, **__) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("steps", "batch", "micro_batch", "tokens", "epochs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--fixed", action="store_true", help="no token ends a completion")
    given = parser.parse_args()
    torch.set_num_threads(2)
    forget_peak()
    before = megabytes("VmRSS")
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        _trainer(given, output, clock).train()
    print(json.dumps({"seconds": clock.seconds, "peak_mb": megabytes("VmHWM") - before}))


def _trainer(given: argparse.Namespace, output: str, clock: Clock) -> PPOTrainer:
    rows = json.loads((given.folder / "prompts.json").read_text(encoding="utf-8"))
    how = {"dtype": getattr(torch, given.dtype)}
    tokenizer = AutoTokenizer.from_pretrained(given.folder / "policy", padding_side="left")
    policy, ref_policy = (AutoModelForCausalLM.from_pretrained(given.folder / "policy", **how) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(given.folder / "reward", **how) for _ in range(2)
    )
    args = PPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=given.dtype == "float32",  # autocast; bf16 weights need none
        gradient_checkpointing=False,
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.batch // given.micro_batch,
        local_rollout_forward_batch_size=min(given.batch, 16),
        num_mini_batches=1,
        num_ppo_epochs=given.epochs,
        total_episodes=given.steps * given.batch,
        response_length=given.tokens,
        stop_token=None if given.fixed else "eos",
        temperature=1.0,
        learning_rate=1e-6,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6,
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": row["ids"]} for row in rows]),
        callbacks=[clock],
    )


if __name__ == "__main__":
    main()

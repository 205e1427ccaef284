"""Supervised fine-tuning on demonstrations: trl's SFTTrainer, fed with ids and labels that `rlhf.text` made.

Loss on the completion only, EOS learned. The trainer brings accumulation, checkpoints and resume; it is not subclassed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf import checkpoint, data, models, text
from rlhf.checkpoint import Checkpoint, seed_of
from rlhf.config import SFTConfig, needed
from rlhf.generation.choice import engine_for
from rlhf.origin import Origin, check_origin, origin_of
from rlhf.progress import Bar, progress, say
from rlhf.report_data import ReportData, write_report_data
from rlhf.run_folder import read_json, write_json
from rlhf.tracking import Tracker
from rlhf.types import DataError, Demonstration, prompt_text

MOST_HELD_OUT = 256
"""Demonstrations that the held-out loss is measured on: more would take longer than it would tell."""

ORIGIN = "origin.json"
"""In each of the trainer's checkpoints: which training it belongs to."""

IGNORED = -100
"""Label of a token without loss, in every Hugging Face model."""


@dataclass(frozen=True)
class SFTResult:
    """What a run leaves behind."""

    policy: Any
    model_folder: Path
    metrics: dict[str, float]


def run(config: SFTConfig) -> SFTResult:
    """The stage behind `rlhf sft`."""
    source = needed(config.data, "data", "the demonstrations")
    demonstrations = data.read_demonstrations(source, config.columns)
    training, held_out = data.split(demonstrations, config.held_out, key=lambda d: d.prompt)
    tokenizer = models.load_tokenizer(config.model)
    policy = models.load_policy(config.model, tokenizer, trainable=config.trainable)
    return train(config, policy=policy, tokenizer=tokenizer, training=training, held_out=held_out)


def train(
    config: SFTConfig,
    *,
    policy: Any,
    tokenizer: Any,
    training: Sequence[Demonstration],
    held_out: Sequence[Demonstration] = (),
) -> SFTResult:
    """Fit the policy's trainable weights to the demonstrations, and write the run to `config.output`.

    An interrupted run goes on from its last checkpoint. Raises DataError when no demonstration fits the limits.
    """
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    folder = Path(config.output)
    rows, held_out_rows = encode(config, tokenizer, training), encode(config, tokenizer, held_out)
    if not training:
        raise DataError(f"all demonstrations are held out: give more, or lower held_out = {config.held_out}")
    if not rows:
        raise DataError(
            f"none of {len(training)} demonstrations fits max_prompt_tokens = {config.max_prompt_tokens}: raise it"
        )
    models.check_context(policy, max(len(row["input_ids"]) for row in rows), "the longest demonstration")
    contract = models.model_contract(
        policy,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_completion_tokens=config.max_completion_tokens,
    )
    steps = _steps(config, len(rows))
    last = _last_checkpoint(folder / "checkpoints")
    done = int(last.name.split("-")[-1]) if last else 0
    origin = origin_of(config, rows)
    if last:
        check_origin(read_json(last / ORIGIN), origin, folder / "checkpoints")
        checkpoint.remove_others(last)
    with (
        Tracker(
            folder, stage="sft", config=config, tracking=config.tracking, resume_step=done if last else None
        ) as tracker,
        progress("sft", total=steps, done=done) as bar,
    ):
        trainer = SFTTrainer(
            model=policy,
            args=_arguments(config, steps),
            train_dataset=_dataset(rows),
            eval_dataset=_dataset(held_out_rows[:MOST_HELD_OUT]) if held_out_rows else None,
            processing_class=tokenizer,
            callbacks=[_reporter(tracker, bar), _sealer(origin)],
        )
        trainer.remove_callback(PrinterCallback)  # our progress line says it
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except BaseException:
            _discard_unsealed(folder / "checkpoints")
            raise
        metrics = {"eval/loss": trainer.evaluate()["eval_loss"]} if held_out_rows else {}
        tracker.log(metrics, step=steps)
        # the trainer's autocast around the policy's forward would stay with it
        policy = trainer.accelerator.unwrap_model(policy, keep_fp32_wrapper=False).eval()
        models.save_model(policy, tokenizer, folder / "model", contract=contract)
        _show_samples(config, tracker, policy, tokenizer, list(held_out or training), steps)
        tracker.summary(metrics | {"demonstrations": len(rows)})
        write_report_data(folder, _report_data(metrics, len(rows)))
    return SFTResult(policy, folder / "model", metrics)


def encode(config: SFTConfig, tokenizer: Any, demonstrations: Sequence[Demonstration]) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of every demonstration whose prompt fits; the others are counted in one line."""
    rows = []
    for demonstration in demonstrations:
        prompt = text.encode_prompt(tokenizer, demonstration.prompt)
        if len(prompt) <= config.max_prompt_tokens:
            completion = text.encode_completion(
                tokenizer, demonstration.completion, max_tokens=config.max_completion_tokens
            )
            rows.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    if len(rows) < len(demonstrations):
        say(f"sft: {len(demonstrations) - len(rows)} prompts are longer than max_prompt_tokens: left out")
    return rows


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _steps(config: SFTConfig, rows: int) -> int:
    return max(1, round(config.epochs * rows / config.batch_size))


def _arguments(config: SFTConfig, steps: int) -> Any:
    from trl.trainer.sft_config import SFTConfig as Arguments

    where = models.device()
    # the trainer knows whole micro-batches only
    fitting = range(1, min(config.micro_batch_size, config.batch_size) + 1)
    micro_batch_size = max(size for size in fitting if config.batch_size % size == 0)
    return Arguments(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // micro_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup_share * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=models.compute_dtype(config.precision, where) == torch.bfloat16,
        fp16=False,
        use_cpu=where.type == "cpu",
        gradient_checkpointing=False,
        max_length=None,
        packing=False,
        train_sampling_strategy="group_by_length",
        logging_steps=config.log_every,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=False,
    )


def _reporter(tracker: Tracker, bar: Bar) -> Any:
    """A trainer callback that hands its numbers to our record and our progress bar."""
    from transformers import TrainerCallback

    names = {
        "loss": "train/loss",
        "grad_norm": "grad_norm",
        "learning_rate": "lr",
        "mean_token_accuracy": "train/token_accuracy",
        "num_input_tokens_seen": "tokens",  # trl's own count begins again when a run goes on
    }

    class Reporter(TrainerCallback):
        loss = float("nan")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            found = {ours: logs[theirs] for theirs, ours in names.items() if logs and theirs in logs}
            if "train/loss" in found:
                self.loss = found["train/loss"]
                tracker.log(found, step=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            known = {} if math.isnan(self.loss) else {"loss": self.loss}
            bar.advance(1, **known, epoch=state.epoch or 0.0)
            # a line is the mean since the last one, which no checkpoint holds: so one begins with each checkpoint
            control.should_log |= control.should_save
            # gone on with from the last step's checkpoint, the trainer would take one step more
            control.should_save &= state.global_step < state.max_steps

    return Reporter()


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest of the trainer's checkpoints that is whole; raises UserError where all are damaged."""
    sealed = [path for path in folder.glob("checkpoint-*") if (path / checkpoint.MANIFEST).is_file()]
    found = checkpoint.newest_whole([Checkpoint(int(path.name.split("-")[-1]), path) for path in sealed], folder)
    return found.path if found else None


def _discard_unsealed(folder: Path) -> None:
    """Remove what was written of a checkpoint when its writing failed."""
    for path in folder.glob("checkpoint-*"):
        if not (path / checkpoint.MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)


def _sealer(origin: Origin) -> Any:
    """A trainer callback that seals each checkpoint once it is written, and only then removes the older ones.

    Beside the trainer's files it says which training it belongs to.
    """
    from transformers import TrainerCallback

    class Sealer(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_json(written / ORIGIN, origin)
                checkpoint.seal(written)
                checkpoint.remove_others(written)

    return Sealer()


def _report_data(metrics: dict[str, float], count: int) -> ReportData:
    """The run in one sentence; the report draws the curves by itself."""
    loss = f"; held-out loss {metrics['eval/loss']:.3f} nats per token" if metrics else ""
    return ReportData(title="Supervised fine-tuning", verdict=f"Trained on {count} demonstrations{loss}.")


def _show_samples(
    config: SFTConfig, tracker: Tracker, policy: Any, tokenizer: Any, shown: Sequence[Demonstration], step: int
) -> None:
    """What the policy writes after a few demonstrations' prompts, beside what a person wrote."""
    where = models.device()
    engine = engine_for(
        policy.to(where),
        eos_token_ids=models.eos_token_ids(policy, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        dtype=models.compute_dtype(config.precision, where),
        batch_size=8,
    )
    chosen = [d for d in shown[:8] if len(text.encode_prompt(tokenizer, d.prompt)) <= config.max_prompt_tokens]
    sampled = engine.generate(
        [text.encode_prompt(tokenizer, d.prompt) for d in chosen],
        max_tokens=config.max_completion_tokens,
        temperature=1.0,
        generator=torch.Generator().manual_seed(seed_of(config.seed, "sft samples")),
    )
    rows = [
        (prompt_text(d.prompt), text.decode_completion(tokenizer, s.ids), d.completion, s.finished)
        for d, s in zip(chosen, sampled, strict=True)
    ]
    tracker.table("samples", ("prompt", "completion", "demonstration", "finished"), rows, step=step)

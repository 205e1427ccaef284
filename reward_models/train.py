"""Train a classifier on rankings, measure it on held-out prompts, calibrate it, and leave an ordinary model folder.

The loop is our own because a ranking is one element of a batch: all its K completions are forwarded together, and its
loss counts once however the batch is cut into micro-batches.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reward_models.evaluation import Evaluation, Scored, evaluate
from reward_models.learner import Learner
from reward_models.model import set_calibration
from reward_models.preferences import EncodedRanking, Preferences, distinct_rows, prepare
from rlhf import checkpoint, models
from rlhf.checkpoint import Checkpoint
from rlhf.config import RewardConfig
from rlhf.contract import digest
from rlhf.progress import progress, say
from rlhf.soft_labels import SoftLabel
from rlhf.tracking import Tracker
from rlhf.trunk import StateFile, Trunk
from rlhf.types import Ranking, prompt_text

EVALUATIONS = 3
"""How often some of the held-out rankings are measured on the way; the end measures all of them."""
CALIBRATED_ON = 512
"""At most so many completions give the scores' mean and standard deviation, which are good to 4 and 3 % then."""
SAMPLES = 8
SAMPLE_COLUMNS = ("prompt", "completions", "annotator")


@dataclass(frozen=True)
class RewardResult:
    """What a run leaves behind."""

    classifier: Any
    """The trained model, in memory, calibrated."""
    model_folder: Path
    """The same on disk, as an ordinary Hugging Face folder."""
    evaluation: Evaluation | None
    """None where no held-out ranking prefers anything."""
    score_mean: float
    score_std: float
    steps: int
    trained_on: int
    """Rankings."""
    seconds_per_ranking: float
    """Of training, evaluation on the way included; NaN where this call had nothing left to train."""
    samples: list[tuple[str, str, str]]
    """Some held-out rankings, as the columns of SAMPLE_COLUMNS."""


def train(
    config: RewardConfig,
    *,
    classifier: Any,
    tokenizer: Any,
    rankings: Sequence[Ranking],
    soft: Sequence[SoftLabel] = (),
) -> RewardResult:
    """Train `classifier` (its trainable weights) on `rankings`, and write the run to `config.output`.

    With `soft` labels these are learned, and `rankings` are their consensus, which the scores are measured against.

    An interrupted run goes on from its last checkpoint and ends as if it had never stopped, unless rankings or settings
    have changed. Raises DataError for rankings that leave nothing to train on, UserError when training diverges.
    """
    preferences = prepare(
        rankings,
        tokenizer,
        held_out=config.held_out,
        max_prompt_tokens=config.max_prompt_tokens,
        max_completion_tokens=config.max_completion_tokens,
        ties_teach=config.loss == "bradley_terry" or bool(soft),
        soft=soft,
    )
    _say_what_is_used(preferences)
    longest = max(len(row) for each in (*preferences.train, *preferences.held_out) for row in each.rows)
    models.check_context(classifier, longest, "the longest prompt with its completion")
    classifier.to(models.device())
    states = _trunk_states(config, classifier, preferences)
    learner = Learner(config, classifier, preferences.train, pad=tokenizer.pad_token_id, states=states)
    checkpoints, mark = Path(config.output) / "checkpoints", _fingerprint(config, preferences)
    saved = _resumable(checkpoints, mark)
    if saved:
        learner.restore(saved)
    with Tracker(
        Path(config.output),
        stage="reward",
        config=config,
        tracking=config.tracking,
        resume_step=saved.step if saved else None,
    ) as tracker:
        seconds = _fit(learner, preferences.held_out, tracker, checkpoints, start=saved.step if saved else 0, mark=mark)
        result = _finish(learner, preferences, tokenizer, tracker, seconds)
    checkpoint.remove_all(checkpoints)  # the model is on disk now
    if states:
        states.remove()
    return result


def _trunk_states(config: RewardConfig, classifier: Any, preferences: Preferences) -> StateFile | None:
    """What the frozen lower layers make of every row, computed once for all epochs and measurements."""
    trunk = Trunk.of(classifier, models.compute_dtype(config.precision, models.device()))
    if trunk is None:
        return None
    rows = distinct_rows([*preferences.train, *preferences.held_out])
    with progress("reward, frozen layers", total=len(rows)) as bar:
        return StateFile(Path(config.output) / "trunk_states.bin", trunk, rows, on_progress=bar.advance)


def _fit(
    learner: Learner,
    held_out: Sequence[EncodedRanking],
    tracker: Tracker,
    checkpoints: Path,
    *,
    start: int,
    mark: str,
) -> float:
    """The loop; returns seconds per ranking."""
    began, steps = time.perf_counter(), learner.steps
    measured_after = {round(i * steps / (EVALUATIONS + 1)) for i in range(1, EVALUATIONS + 1)} - {steps}
    few = held_out[: max(16, len(learner.rankings) // 16)]  # so that measuring costs a fifth of training at most
    accuracy: dict[str, float] = {}
    with progress("reward", total=steps, done=start) as bar:
        for number in range(start, steps):
            step = learner.step(number)
            metrics = {
                "train/loss": step.loss,
                "train/accuracy": step.accuracy,
                "grad_norm": step.grad_norm,
                "lr": step.learning_rate,
                "epoch": min((number + 1) * learner.config.batch_size, learner.total) / len(learner.rankings),
            }
            done = number + 1
            if done in measured_after:
                measured = _measure(learner, few)
                metrics |= measured
                accuracy = {"accuracy": measured["eval/accuracy"]} if measured else {}
            tracker.log(metrics, step=done)
            bar.advance(1, loss=step.loss, **accuracy)
            if done < steps and done % learner.config.save_every == 0:
                learner.save(checkpoints, done, fingerprint=mark)
    trained = learner.total - start * learner.config.batch_size
    return (time.perf_counter() - began) / trained if trained > 0 else math.nan


def _measure(learner: Learner, held_out: Sequence[EncodedRanking]) -> dict[str, float]:
    scored = learner.score(held_out)
    evaluation = evaluate(scored, seed=learner.config.seed, resamples=10)  # the intervals are not shown on the way
    return evaluation.metrics() | {"eval/loss": learner.loss(scored)} if evaluation else {}


def _finish(
    learner: Learner, preferences: Preferences, tokenizer: Any, tracker: Tracker, seconds: float
) -> RewardResult:
    """Measure, calibrate, save."""
    config, everything = learner.config, [*preferences.train, *preferences.held_out]
    reference = _reference_rows(everything, config.seed)
    count = sum(len(each.rows) for each in preferences.held_out) + len(reference)
    with progress("reward, measured and calibrated", total=count) as bar:
        scored = learner.score(preferences.held_out, bar.advance)
        evaluation = evaluate(scored, agreement_from=[each.ranking for each in everything], seed=config.seed)
        mean, std = set_calibration(learner.classifier, learner.scores(reference, bar.advance))
    contract = models.model_contract(
        learner.classifier,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_completion_tokens=config.max_completion_tokens,
    )
    folder = Path(config.output) / "model"
    models.save_model(learner.classifier, tokenizer, folder, contract=contract)
    result = RewardResult(
        classifier=learner.classifier,
        model_folder=folder,
        evaluation=evaluation,
        score_mean=mean,
        score_std=std,
        steps=learner.steps,
        trained_on=len(preferences.train),
        seconds_per_ranking=seconds,
        samples=[_sample(each, mean, std) for each in scored[:SAMPLES]],
    )
    _track(result, learner, scored, tracker)
    return result


def _reference_rows(rankings: Sequence[EncodedRanking], seed: int) -> list[tuple[int, ...]]:
    """What the scores are calibrated on: the completions that were ranked, which the SFT policy wrote."""
    rows = distinct_rows(rankings)
    return rows if len(rows) <= CALIBRATED_ON else random.Random(seed).sample(rows, CALIBRATED_ON)


def _sample(scored: Scored, mean: float, std: float) -> tuple[str, str, str]:
    """(prompt, completions with score and rank, annotator), best score first."""
    ranking = scored.ranking
    order = sorted(range(len(scored.scores)), key=lambda i: -scored.scores[i])
    lines = [
        f"[score {(scored.scores[i] - mean) / std:+.2f}, rank {ranking.ranks[i] or 'none'}] {ranking.completions[i]}"
        for i in order
    ]
    return prompt_text(ranking.prompt), "\n".join(lines), ranking.annotator


def _track(result: RewardResult, learner: Learner, scored: Sequence[Scored], tracker: Tracker) -> None:
    evaluation = result.evaluation
    numbers = {"score_mean": result.score_mean, "score_std": result.score_std}
    if evaluation:
        numbers |= evaluation.metrics() | {"eval/loss": learner.loss(scored)}
    tracker.log(numbers, step=result.steps)
    tracker.table("held_out", SAMPLE_COLUMNS, result.samples, step=result.steps)
    tracker.summary(numbers | {"trained_on": result.trained_on, "held_out": len(scored)})
    if evaluation is None:
        tracker.alert(
            "Accuracy unknown",
            "no held-out ranking prefers one completion to another, so nothing tells how good this reward model is: "
            "rank more prompts (a prompt is held out by its hash), or raise held_out in every stage",
        )
    elif evaluation.weakness():
        tracker.alert("Weak reward model", evaluation.weakness() or "")


def _say_what_is_used(preferences: Preferences) -> None:
    say(f"reward: {len(preferences.train)} rankings to train on, {len(preferences.held_out)} held out")
    for reason, count in preferences.left_out.items():
        say(f"reward: {count} left out: {reason}")


def _fingerprint(config: RewardConfig, preferences: Preferences) -> str:
    """Of everything that decides the result: settings, token ids and ranks."""
    settings = {
        name: value for name, value in asdict(config).items() if name not in ("tracking", "output", "save_every")
    }
    data = [(each.rows, each.ranking.ranks, each.soft) for each in (*preferences.train, *preferences.held_out)]
    return digest(json.dumps([settings, data]))


def _resumable(checkpoints: Path, mark: str) -> Checkpoint | None:
    """The last checkpoint of this very training; one of another training is removed."""
    saved = checkpoint.latest(checkpoints)
    if saved is None:
        return None
    if saved.numbers().get("fingerprint") != mark:
        say("reward: rankings or settings have changed since the last checkpoint, so training starts again")
        checkpoint.remove_all(checkpoints)
        return None
    say(f"reward: goes on from the checkpoint of step {saved.step}")
    return saved

"""One finished run of the demo and its peer: what TRL is given, what it learned, and how both policies score."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import contract, data, evaluation, models, pipeline, ppo, settings, text
from rlhf.config import EvaluateConfig, PPOConfig, Tracking, needed
from rlhf.progress import say
from rlhf.run_folder import read_json, read_records, write_json
from rlhf.statistics import Estimate

SAMPLES_PER_PROMPT = 2
CHECKED = 32
"""Texts whose scores are compared, at most."""
SCORE_TOLERANCE = 1e-4
"""In fp32."""
SAME = (
    *("num_mini_batches", "num_ppo_epochs", "kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam"),
    *("whiten_rewards", "temperature", "missing_eos_penalty", "seed"),
)
"""Settings that mean the same in TRL, under the same name."""
PEER_SCRIPT = Path(__file__).parent / "peer_learn.py"


@dataclass(frozen=True)
class Run:
    """A run of ours, and where its peer's parts are kept."""

    config: PPOConfig
    """Of our PPO, with the models where they are now."""
    ours: Path
    output: Path
    num_prompts: int
    """Held out, to compare on."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        return f"seed {self.seed}"

    @property
    def task(self) -> Path:
        """What the peer is told."""
        return self.output / "task.json"


@dataclass(frozen=True)
class Answers:
    """A policy's answers to the held-out prompts, in numbers; scores are (prompts, samples)."""

    scores: np.ndarray
    sft_scores: np.ndarray
    """Of the SFT policy, drawn with the same random numbers."""
    score: Estimate
    sft_score: Estimate
    kl: Estimate
    """To the SFT policy, nats a sequence."""


def load_run(folder: Path, output: Path, *, num_prompts: int, bf16: bool) -> Run:
    """Read a finished run and write its task. Refuses one that TRL cannot repeat, or parts of another comparison."""
    config, _ = settings.parse(PPOConfig, ["--config", str(folder / "ppo" / "config.yaml")], command="ppo")
    policy, reward = (str((folder / stage / "model").resolve()) for stage in ("sft", "reward"))
    config = replace(config, model=policy, reward=reward)
    ours = folder / "ppo" / "model"
    if not ours.is_dir():
        raise SystemExit(f"{folder} is no finished run: {ours} is missing")
    _check_repeatable(config)
    run = Run(config, ours, output / f"seed-{config.seed}", num_prompts)
    run.output.mkdir(parents=True, exist_ok=True)
    task = _task(run, folder) | {"bf16": bf16}
    if run.task.is_file() and read_json(run.task) != task:
        raise SystemExit(f"{run.output} holds parts of another comparison: give another --output")
    write_json(run.task, task)
    return run


def _check_repeatable(config: PPOConfig) -> None:
    """TRL knows one EOS, and lets a cut completion end with it at its own limit: so must the reward model."""
    reward = contract.load(Path(needed(config.reward, "reward", "the reward model")))
    if reward is None or reward.max_completion_tokens != config.max_completion_tokens or len(reward.eos_token_ids) > 1:
        raise SystemExit(
            f"{config.reward}: TRL reads the same text only where PPO has the reward model's max_completion_tokens and "
            f"there is one EOS: train one of them again"
        )
    if config.kl_target is not None or config.cliprange_value is None or config.schedule != "linear":
        raise SystemExit("TRL has a fixed kl_coef, clips values and lowers its learning rate linearly: so must the run")


def _task(run: Run, folder: Path) -> dict[str, Any]:
    config = run.config
    tokenizer = models.load_tokenizer(str(config.model))
    return {
        "policy": config.model,
        "reward": config.reward,
        "prompts": _prompts(config, tokenizer),
        "checked": _checked(config, tokenizer, read_records(folder / "ppo" / "samples.jsonl")),
        "total_episodes": config.total_episodes,
        "batch_size": config.batch_size,
        "max_completion_tokens": config.max_completion_tokens,
        "same": {name: getattr(config, name) for name in SAME},
    }


def _prompts(config: PPOConfig, tokenizer: Any) -> list[list[int]]:
    """Ids of the prompts of all our steps, in our order."""
    source = needed(config.prompts, "prompts", "the prompts to train on")
    prompts = data.distinct(data.read_prompts(source, config.columns))
    training, _ = data.split(prompts, config.held_out, key=lambda prompt: prompt)
    ids, _ = text.encode_prompts(tokenizer, training, max_tokens=config.max_prompt_tokens)
    return [ids[i] for i in ppo.prompt_indices(len(ids), 0, config.total_episodes, seed=config.seed)]


def _checked(config: PPOConfig, tokenizer: Any, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Completions of our PPO as TRL's rollout would hold them: with EOS, or cut off at the limit without it."""
    limit, rows = config.max_completion_tokens, []
    for sample in samples:
        prompt, completion = sample["prompt"], sample["completion"]
        ids = text.encode_completion(tokenizer, completion)
        if not sample["finished"]:
            ids = ids[:-1]
        # left out: texts that are tokenised into more or fewer tokens than were sampled
        if len(ids) == limit or (sample["finished"] and len(ids) < limit):
            prompt_ids = text.encode_prompt(tokenizer, prompt)
            rows.append({"text": [prompt, completion], "prompt": prompt_ids, "completion": ids})
    return rows[:CHECKED]


def check_scores(run: Run, python: Path) -> float:
    """The largest gap between TRL's score of a text and ours; ends the program where that is no rounding."""
    command = [python, PEER_SCRIPT, run.task, "--check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    prompts, completions = zip(*(row["text"] for row in read_json(run.task)["checked"]), strict=True)
    reward = pipeline.load_reward(str(run.config.reward), _contract(run), precision="fp32")
    gap = float(np.abs(np.array(theirs) - np.array(reward(prompts, completions))).max())
    if not gap <= SCORE_TOLERANCE:
        raise SystemExit(f"{run.name}: TRL's score of a text differs from ours by up to {gap:.2g}")
    say(f"{run.name}: TRL's scores of {len(theirs)} texts are ours, to {gap:.1g}")
    return gap


def _contract(run: Run) -> contract.Contract:
    found = contract.load(Path(str(run.config.model)))
    assert found is not None, "every model of a run has a contract"
    return found


def peer_answers(run: Run, rate: float, python: Path) -> Answers:
    """Those of the policy that TRL trained with this learning rate; what is missing of both is made now."""
    return evaluated(run, _learned(run, rate, python), _peer_name(rate))


def _peer_name(rate: float) -> str:
    return f"trl-{rate:g}"


def _learned(run: Run, rate: float, python: Path) -> Path:
    output = run.output / _peer_name(rate)
    if not (output / "model").is_dir():
        say(f"{run.name}: TRL trains with a learning rate of {rate:g}")
        command = [python, PEER_SCRIPT, run.task, "--output", output, "--learning_rate", str(rate)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return output / "model"


def evaluated(run: Run, policy: Path, name: str) -> Answers:
    """The policy beside the SFT policy on the held-out prompts, sampled now if that is not there."""
    folder = run.output / "evaluate" / name
    if not (folder / "evaluation.json").is_file():
        say(f"{run.name}: {name} answers the held-out prompts")
        shutil.rmtree(folder, ignore_errors=True)  # of one that was interrupted
        config = _evaluation(run, policy, folder)
        evaluation.run(config, load_reward=partial(pipeline.load_reward, precision=config.precision))
    found, samples = read_json(folder / "evaluation.json"), read_records(folder / "samples.jsonl")
    return Answers(
        scores=_by_prompt(samples, "policy score"),
        sft_scores=_by_prompt(samples, "baseline score"),
        score=Estimate(**found["policy"]["score"]),
        sft_score=Estimate(**found["baseline"]["score"]),
        kl=Estimate(**found["kl"]),
    )


def _by_prompt(samples: Sequence[dict[str, Any]], column: str) -> np.ndarray:
    return np.array([row[column] for row in samples]).reshape(-1, SAMPLES_PER_PROMPT)


def _evaluation(run: Run, policy: Path, folder: Path) -> EvaluateConfig:
    ours = run.config
    return EvaluateConfig(
        policy=str(policy),
        baseline=ours.model,
        reward=ours.reward,
        prompts=ours.prompts,
        output=str(folder),
        columns=ours.columns,
        held_out=ours.held_out,
        num_prompts=run.num_prompts,
        samples_per_prompt=SAMPLES_PER_PROMPT,
        best_of_n=SAMPLES_PER_PROMPT,  # as many samples of both, so that they share their random numbers
        temperature=ours.temperature,
        max_prompt_tokens=ours.max_prompt_tokens,
        max_completion_tokens=ours.max_completion_tokens,
        batch_size=ours.rollout_batch_size,
        precision=ours.precision,
        seed=ours.seed,
        tracking=Tracking(wandb="off"),
    )

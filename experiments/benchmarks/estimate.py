"""`python -m experiments.benchmarks.estimate`: what `rlhf ppo --estimate` foretells against what then happens.

Both are given one config, policy, reward model and prompts, each in a process of its own: first the estimate, then a
few real steps. Seconds of a real step are means over the steps that train the policy, the first of the process left
out; memory is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks import record
from experiments.benchmarks.ppo.load import REWARD_SEED, prepare
from experiments.benchmarks.ppo.memory import megabytes

MODEL = "embedded:smollm2-135m"
STEPS = 3
COMMON = {"held_out": 0.0, "num_mini_batches": 1, "value_warmup_steps": 1, "save_every": STEPS, "learning_rate": 1e-6}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"batch_size": 8, "micro_batch_size": 4, "rollout_batch_size": 8, "max_completion_tokens": 32},
    "last_layers 6": {
        "trainable": {"last_layers": 6},
        **{"batch_size": 16, "micro_batch_size": 8, "rollout_batch_size": 16, "max_completion_tokens": 32},
    },
    "longer completions": {
        "trainable": {"last_layers": 6},
        **{"batch_size": 16, "micro_batch_size": 4, "rollout_batch_size": 8, "max_completion_tokens": 96},
    },
}
PARTS = ("sample", "score", "measure", "update")


def main() -> None:
    """Foretell, run, compare."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.estimate", description=__doc__)
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    parser.add_argument("--prompt_tokens", type=int, default=48)
    record.add_json_flag(parser)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        print(json.dumps(train(given.train)))
        return
    made_by = record.origin("experiments.benchmarks.estimate", given, seed=REWARD_SEED)
    chosen = [given.only] if given.only else list(SETTINGS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, model=MODEL, load="real", count=64, prompt_tokens=given.prompt_tokens)
        rows = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        lines = [json.dumps({"prompt": row["prompt"]}) for row in rows]
        (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        settings = {name: compared(folder, SETTINGS[name]) for name in chosen}
    record.publish(made_by | {"steps": STEPS, "compared": settings}, table(settings), json_to=given.json)


def compared(folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Both sides on one setting, and their ratios."""
    config = {
        **COMMON,
        "model": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "prompts": str(folder / "prompts.jsonl"),
        "output": tempfile.mkdtemp(dir=folder),
        "total_episodes": STEPS * changes["batch_size"],
        "tracking": {"wandb": "off"},
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    told = _run("rlhf", "ppo", "--config", str(file), "--estimate", "--json")
    estimated = {part["name"]: part["seconds"] for part in told["parts"]}
    estimated |= {"step": told["step_seconds"], "run": told["total_seconds"], "peak_mb": told["peak_bytes"] / 2**20}
    print("estimated", json.dumps(estimated), file=sys.stderr)
    happened = _run("experiments.benchmarks.estimate", "--train", str(file))
    ratios = {name: estimated[name] / happened[name] for name in estimated}
    return {
        "config": dict(COMMON) | dict(changes),
        "probe_seconds": told["probe_seconds"],
        "estimated": estimated,
        "happened": happened,
        "ratio": ratios,
    }


def train(file: Path) -> dict[str, float]:
    """Seconds of an ordinary run, by part, and its peak memory."""
    from rlhf import cli, settings
    from rlhf.config import PPOConfig
    from rlhf.run_folder import read_records

    config, _ = settings.parse(PPOConfig, ["--config", str(file)], command="ppo")
    saved = _watch_saves()
    if cli.main(["ppo", "--config", str(file)]):
        raise SystemExit("the run failed")
    rows = read_records(Path(config.output) / "metrics.jsonl")
    counted = rows[max(1, config.value_warmup_steps) :]
    found = {part: statistics.fmean(row[f"timing/{part}_seconds"] for row in counted) for part in PARTS}
    steps = [config.batch_size / row["timing/eps"] for row in rows]
    return {**found, "step": sum(found.values()), "run": sum(steps) + sum(saved), "peak_mb": megabytes("VmHWM")}


def _watch_saves() -> list[float]:
    """Will hold the seconds of every checkpoint."""
    import time

    from rlhf.learner import Learner

    seconds: list[float] = []
    save = Learner.save

    def timed(self: Learner, folder: Path, step: int, numbers: dict[str, Any]) -> None:
        started = time.perf_counter()
        save(self, folder, step, numbers)
        seconds.append(time.perf_counter() - started)

    Learner.save = timed
    return seconds


def table(settings: Mapping[str, Any]) -> str:
    """Estimated over happened, as Markdown."""
    names = (*PARTS, "step", "run", "peak_mb")
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, found in settings.items():
        shown = " | ".join(f"{found['ratio'][each]:.2f}" for each in names)
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def _run(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON object on the last line that a command prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()

"""`python -m experiments.benchmarks.ppo_vs_trl`: our PPO and TRL 1.12's on the same load, interleaved in one run.

Both get the same policy, reward model, prompts, lengths, epochs and two threads, each in a process of its own. TRL
comes from its own virtual environment, made here, which shares every other library with ours. The dtype of its weights
and its micro-batch are searched first, and stated. Seconds are of whole PPO steps, the first of each process left out;
memory is the peak above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import record
from experiments.benchmarks.ppo.load import REWARD_SEED, prepare
from experiments.benchmarks.ppo.peer_environment import FOLDER, PEER, peer_python
from rlhf.progress import quiet, say

HERE = Path(__file__).parent
Run = Mapping[str, Any]


def main() -> None:
    """Search, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.ppo_vs_trl", description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--load", choices=("fixed", "real"), default="fixed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each process; the first is not counted")
    parser.add_argument("--search_steps", type=int, default=2, help="of TRL with each setting; the last one counts")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--last_layers", type=int, default=6, help="trained in the third of ours")
    parser.add_argument("--peer", type=Path, default=FOLDER, help="the peer's virtual environment")
    record.add_json_flag(parser)
    given = parser.parse_args()
    quiet()
    origin = record.origin("experiments.benchmarks.ppo_vs_trl", given, seed=REWARD_SEED)
    python = peer_python(given.peer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = max(4 * given.batch, 64)
        prepare(folder, model=given.model, load=given.load, count=count, prompt_tokens=given.prompt_tokens)
        result = origin | {"peer": PEER} | compare(given, python, folder)
    record.publish(result, table(result), json_to=given.json)


def ours(layers: int) -> dict[str, tuple[str, ...]]:
    """What of ours is measured, and the flags for it; micro-batches larger than these are hardly faster."""
    return {
        "full, separate critic": ("--value", "separate", "--micro_batch", "4"),
        "full, value head": ("--value", "head", "--micro_batch", "4"),
        f"top {layers} layers, value head": ("--value", "head", "--last_layers", str(layers), "--micro_batch", "6"),
        "LoRA, value head": ("--value", "head", "--lora", "--micro_batch", "4"),
    }


def compare(given: argparse.Namespace, python: Path, folder: Path) -> dict[str, Any]:
    """All runs, in turns."""
    searched = search(given, python, folder)
    best = min(searched, key=lambda run: run["seconds"][-1])
    ways = ours(given.last_layers)
    runs: dict[str, list[Run]] = {name: [] for name in ("TRL", *ways)}
    for pair in range(1, given.pairs + 1):
        turn = f"pair {pair} of {given.pairs}"
        peer = _peer(given, folder, best["dtype"], best["micro_batch"], steps=given.steps)
        runs["TRL"].append(_run([python, *peer], f"{turn}, TRL"))
        for name, flags in ways.items():
            runs[name].append(_run([sys.executable, *_ours(given, folder, flags)], f"{turn}, ours, {name}"))
    return {
        "searched": searched,
        "chosen": {"dtype": best["dtype"], "micro_batch": best["micro_batch"]},
        "runs": runs,
        "medians": medians(runs, given.batch),
    }


def search(given: argparse.Namespace, python: Path, folder: Path) -> list[dict[str, Any]]:
    """A few steps of the peer with each dtype of its weights and each micro-batch."""
    sizes = sorted({4, 8, 16} & set(range(1, given.batch + 1)))
    tried = [(dtype, size) for dtype in ("float32", "bfloat16") for size in sizes]
    return [
        {"dtype": dtype, "micro_batch": size}
        | _run(
            [python, *_peer(given, folder, dtype, size, steps=given.search_steps)],
            f"search {number} of {len(tried)}, TRL with {dtype} weights in micro-batches of {size}",
        )
        for number, (dtype, size) in enumerate(tried, 1)
    ]


def medians(runs: Mapping[str, Sequence[Run]], batch: int) -> dict[str, dict[str, float]]:
    """Samples per second and peak memory of each, and both relative to the peer's run of the same turn."""
    rates = {name: [batch / statistics.median(run["seconds"][1:]) for run in each] for name, each in runs.items()}
    peaks = {name: [run["peak_mb"] for run in each] for name, each in runs.items()}
    return {
        name: {
            "samples_per_second": statistics.median(rates[name]),
            "times_as_fast": statistics.median(a / b for a, b in zip(rates[name], rates["TRL"], strict=True)),
            "peak_mb": statistics.median(peaks[name]),
            "share_of_memory": statistics.median(a / b for a, b in zip(peaks[name], peaks["TRL"], strict=True)),
        }
        for name in runs
    }


def table(result: Mapping[str, Any]) -> str:
    """The medians as Markdown."""
    lines = ["| | samples/s | times TRL | peak MB | share of TRL's |", "|---|---|---|---|---|"]
    for name, row in result["medians"].items():
        lines.append(
            f"| {name} | {row['samples_per_second']:.2f} | {row['times_as_fast']:.2f} | {row['peak_mb']:.0f} "
            f"| {row['share_of_memory']:.2f} |"
        )
    chosen = result["chosen"]
    return "\n".join(
        [*lines, "", f"TRL at its best: {chosen['dtype']} weights, micro-batches of {chosen['micro_batch']}"]
    )


def _shape(given: argparse.Namespace, steps: int) -> list[str]:
    flags = ["--steps", steps, "--batch", given.batch, "--tokens", given.tokens, "--epochs", given.epochs]
    return [*map(str, flags), *(["--fixed"] if given.load == "fixed" else [])]


def _peer(given: argparse.Namespace, folder: Path, dtype: str, size: int, *, steps: int) -> list[str]:
    flags = [*_shape(given, steps), "--dtype", dtype, "--micro_batch", str(size)]
    return [str(HERE / "ppo" / "peer.py"), str(folder), *flags]


def _ours(given: argparse.Namespace, folder: Path, flags: Sequence[str]) -> list[str]:
    return ["-m", "experiments.benchmarks.ppo.ours", str(folder), *_shape(given, given.steps), *flags]


def _run(command: Sequence[str | Path], name: str) -> dict[str, Any]:
    """What the command prints last, as JSON; a line on stderr tells of it and of how long the process took."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    run = json.loads(done.stdout.strip().splitlines()[-1])
    steps = ", ".join(f"{seconds:.1f}" for seconds in run["seconds"])
    say(f"{name}: {time.perf_counter() - started:.0f} s, steps of {steps} s, {run['peak_mb']:.0f} MB")
    return run


if __name__ == "__main__":
    main()

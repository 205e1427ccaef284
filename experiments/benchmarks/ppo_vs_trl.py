"""`python -m experiments.benchmarks.ppo_vs_trl`: our PPO and TRL 1.12's on the same load, interleaved in one run.

Both get the same policy, reward model, prompts, lengths, epochs and two threads, each in a process of its own. TRL
comes from its own virtual environment, made here, which shares every other library with ours. The dtype of its weights
and its micro-batch are searched first, and stated. Seconds are of whole PPO steps, the first of each process left out;
memory is the peak above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import site
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.ppo.load import prepare
from rlhf.environment import describe_environment

PEER = "trl==1.12.0"
"""The last release that holds a PPO trainer."""
HERE = Path(__file__).parent
Run = Mapping[str, Any]


def main() -> None:
    """Search, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.ppo_vs_trl", description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--load", choices=("fixed", "real"), default="fixed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each process; the first is not counted")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--last_layers", type=int, default=6, help="trained in the third of ours")
    parser.add_argument("--peer", type=Path, default=HERE / ".peer", help="the peer's virtual environment")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    python = peer_python(given.peer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = max(4 * given.batch, 64)
        prepare(folder, model=given.model, load=given.load, count=count, prompt_tokens=given.prompt_tokens)
        result = compare(given, python, folder)
    print(json.dumps(result) if given.json else table(result))


def ours(layers: int) -> dict[str, tuple[str, ...]]:
    """What of ours is measured, and the flags for it."""
    return {
        "full, separate critic": ("--value", "separate"),
        "full, value head": ("--value", "head"),
        f"top {layers} layers, value head": ("--value", "head", "--last_layers", str(layers)),
    }


def compare(given: argparse.Namespace, python: Path, folder: Path) -> dict[str, Any]:
    """All runs, in turns."""
    searched = [
        {"dtype": dtype, "micro_batch": size, **_peer(given, python, folder, dtype, size, steps=2)}
        for dtype in ("float32", "bfloat16")
        for size in sorted({4, 8, 16} & set(range(1, given.batch + 1)))
    ]
    best = min(searched, key=lambda run: run["seconds"][-1])
    ways = ours(given.last_layers)
    runs: dict[str, list[Run]] = {name: [] for name in ("TRL", *ways)}
    for _ in range(given.pairs):
        runs["TRL"].append(_peer(given, python, folder, best["dtype"], best["micro_batch"], steps=given.steps))
        for name, flags in ways.items():
            runs[name].append(_ours(given, folder, flags))
    settings = {name: value for name, value in vars(given).items() if name not in ("peer", "json")}
    return {
        "settings": settings,
        "environment": describe_environment() | {"peer": PEER},
        "searched": searched,
        "chosen": {"dtype": best["dtype"], "micro_batch": best["micro_batch"]},
        "runs": runs,
        "medians": medians(runs, given.batch),
    }


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


def _peer(given: argparse.Namespace, python: Path, folder: Path, dtype: str, size: int, *, steps: int) -> Run:
    flags = [*_shape(given, steps), "--dtype", dtype, "--micro_batch", str(size)]
    return _run([str(python), str(HERE / "ppo" / "peer.py"), str(folder), *flags])


def _ours(given: argparse.Namespace, folder: Path, flags: Sequence[str]) -> Run:
    command = [sys.executable, "-m", "experiments.benchmarks.ppo.ours", str(folder), *_shape(given, given.steps)]
    return _run([*command, "--micro_batch", str(min(given.batch, 16)), *flags])


def _run(command: Sequence[str]) -> Run:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_python(folder: Path) -> Path:
    """The Python of a virtual environment that holds the peer, and sees our libraries behind it."""
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        venv.create(folder, clear=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "lib" / version / "site-packages"
        (packages / "ours.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), PEER]
        subprocess.run(install, check=True, stdout=sys.stderr)
        (folder / "installed").touch()
    return python


if __name__ == "__main__":
    main()

"""`python -m experiments.benchmarks.scaling`: how the cost of one PPO step grows with its size; it must be linear.

Three sizes are doubled, each alone: the batch, the tokens of a completion, and the samples of each prompt. The load has
a fixed length (no token ends a completion), the prompts have `--prompt_tokens` tokens, and each table, for all weights
or the top layers with a value head, runs in a process of its own. The first step of a size is not counted. Seconds are
medians of the others: of sampling, of measuring (the score, and logprobs under policy and reference) and of updating.

A table ends before a size that would take it past `--limit` seconds, going by how the last size grew; what was left out
is stated. The slope is that of log(seconds) over log(tokens), by least squares, where 1 is linear and less means that
large batches use the machine better. The ratio compares seconds per 1,000 tokens with the best of the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import record
from experiments.benchmarks.ppo.load import REWARD_SEED, prepare
from rlhf.progress import quiet, say

PARTS = ("sampling", "measuring", "updating")
SIZES = {
    "batch": (8, 16, 32, 64, 128, 256),
    "tokens": (16, 32, 64, 128, 256, 512),
    "samples_per_prompt": (1, 2, 4, 8, 16),
}
"""What grows -> its sizes."""
AT_REST = {"batch": 8, "tokens": 32, "samples_per_prompt": 1}
"""The size of each while another grows; `batch` counts prompts."""
Row = Mapping[str, Any]


def main() -> None:
    """Measure, print tables or JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.scaling", description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--only", choices=tuple(SIZES), nargs="+", default=list(SIZES), help="what grows")
    parser.add_argument("--largest", type=int, help="leave out larger sizes")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each table")
    parser.add_argument("--steps", type=int, default=2, help="of each size; the first is not counted")
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--last_layers", type=int, default=6, help="trained in the second of ours")
    record.add_json_flag(parser)
    given = parser.parse_args()
    quiet()
    origin = record.origin("experiments.benchmarks.scaling", given, seed=REWARD_SEED)
    with tempfile.TemporaryDirectory() as name:
        count = max(SIZES["batch"])
        prepare(Path(name), model=given.model, load="fixed", count=count, prompt_tokens=given.prompt_tokens)
        tables = [
            measured(given, Path(name), grows, layers) for grows in given.only for layers in (0, given.last_layers)
        ]
    result = origin | {"at_rest": AT_REST, "tables": tables}
    record.publish(result, "\n\n".join(map(markdown, tables)), json_to=given.json)


def measured(given: argparse.Namespace, folder: Path, grows: str, layers: int) -> dict[str, Any]:
    """One table, in a process of its own."""
    trained = f"top {layers} layers" if layers else "all weights"
    sizes = [size for size in SIZES[grows] if given.largest is None or size <= given.largest]
    say(f"{grows} from {sizes[0]} to {sizes[-1]}, {trained}")
    command = [sys.executable, "-m", "experiments.benchmarks.ppo.sizes", str(folder), grows, *map(str, sizes)]
    flags = {"limit": given.limit, "steps": given.steps, "epochs": given.epochs, "last_layers": layers}
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "grows": grows,
        "trained": trained,
        "rows": rows,
        "left_out": sizes[len(rows) :],
        "slopes": slopes(rows),
    }


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Of each part and of the whole step; none from fewer than two sizes."""
    if len(rows) < 2:
        return {}
    tokens = [row["tokens"] for row in rows]
    return {name: slope(tokens, [row[name] for row in rows]) for name in (*PARTS, "step")}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """k of the power law seconds = c * size ** k, by least squares on the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def markdown(table: Mapping[str, Any]) -> str:
    """A row for each size, and one with the slopes."""
    head = [table["grows"], *PARTS, "step, s", "tokens", "s per 1,000 tokens", "ratio", "peak MB"]
    costs = [1000 * row["step"] / row["tokens"] for row in table["rows"]]
    rows = [
        [
            *(str(row["size"]), *(f"{row[part]:.2f}" for part in PARTS), f"{row['step']:.2f}", str(row["tokens"])),
            *(f"{cost:.2f}", f"{cost / min(costs):.2f}", f"{row['peak_mb']:.0f}"),
        ]
        for row, cost in zip(table["rows"], costs, strict=True)
    ]
    fitted = [f"{value:.2f}" for value in table["slopes"].values()]
    last = [["slope", *fitted, "", "", "", ""]] if fitted else []
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows, *last)]
    out = [f"\nLeft out for the time limit: {', '.join(map(str, table['left_out']))}"] if table["left_out"] else []
    return "\n".join([f"{table['trained']}, value head:\n", *lines, *out])


if __name__ == "__main__":
    main()

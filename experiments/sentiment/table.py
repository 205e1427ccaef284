"""The demo's numbers from run folders, as the Markdown tables of README.md.

    python -m experiments.sentiment.table runs/seed-0/sentiment runs/seed-1/sentiment ...

Where a run holds an evaluation of best of 16 (`rlhf evaluate ... --output RUN/best_of_16`), it has its rows, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STAGES = ("sft", "sample", "label", "reward", "ppo", "evaluate")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of the demo")
    runs = parser.parse_args().runs
    print("\n\n".join((_table("", ROWS, runs), _table("best of n of SFT", BEST, runs), _table("minutes", TIMES, runs))))


def _table(title: str, rows: Sequence[tuple[str, Callable[[Path], str | None]]], runs: Sequence[Path]) -> str:
    seeds = [f"seed {_json(run / 'ppo' / 'env.json')['seed']}" for run in runs]
    lines = [_line([title, *seeds]), _line(["---"] * (len(runs) + 1))]
    for name, cell in rows:
        cells = [cell(run) for run in runs]
        if any(cells):
            lines.append(_line([name, *(each or "" for each in cells)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _evaluation(run: Path) -> Any:
    return _json(run / "evaluate" / "evaluation.json")


def _interval(estimate: dict[str, float]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _of_policy(name: str, policy: str) -> Callable[[Path], str]:
    def cell(run: Path) -> str:
        value = _evaluation(run)[policy][name]
        return _interval(value) if isinstance(value, dict) else f"{value:.3f}"

    return cell


def _win_rate(run: Path) -> str:
    return f"**{_interval(_evaluation(run)['win_rate'])}**"


def _kl(run: Path) -> str:
    return _interval(_evaluation(run)["kl"])


def _gain_per_nat(run: Path) -> str:
    found = _evaluation(run)
    return f"{(found['policy']['judged']['value'] - found['baseline']['judged']['value']) / found['kl']['value']:.3f}"


def _fact(name: str) -> Callable[[Path], str | None]:
    """A number of the reward model's own report."""

    def cell(run: Path) -> str | None:
        facts = {each["name"]: each for each in _json(run / "reward" / "report.json")["facts"]}
        fact = facts.get(name)
        if fact is None:
            return None
        return f"{fact['value']:.3f}" if fact["low"] is None else _interval(fact)

    return cell


def _agreement(run: Path) -> str:
    return _interval(_json(run / "label" / "label.json")["agreement"]["without_ties"])


def _best(n: int, what: str) -> Callable[[Path], str | None]:
    """Best of n by the reward model, from the larger pool where there is one."""

    def cell(run: Path) -> str | None:
        pool = run / "best_of_16" / "evaluation.json"
        found = _json(pool) if pool.is_file() else _evaluation(run)
        best = next((each for each in found["best_of_n"] if each["n"] == n), None)
        if best is None:
            return None
        gain = best["judged"] - found["baseline"]["judged"]["value"]
        return {
            "judged": f"{best['judged']:.3f}",
            "score": f"{best['score']:.3f}",
            "kl": f"{best['kl']:.2f}",
            "per nat": f"{gain / best['kl']:.3f}",
        }[what]

    return cell


def _minutes(stage: str) -> Callable[[Path], str | None]:
    return lambda run: f"{_json(run / stage / 'env.json')['seconds'] / 60:.1f}"


def _total(run: Path) -> str:
    return f"**{sum(_json(run / stage / 'env.json')['seconds'] for stage in STAGES) / 60:.1f}**"


ROWS = (
    ("win rate of PPO over SFT, by the judge", _win_rate),
    ("sentiment of SFT, by the judge", _of_policy("judged", "baseline")),
    ("sentiment of PPO, by the judge", _of_policy("judged", "policy")),
    ("score of SFT, by the reward model", _of_policy("score", "baseline")),
    ("score of PPO, by the reward model", _of_policy("score", "policy")),
    ("KL to SFT, nats a sequence", _kl),
    ("sentiment gained per nat", _gain_per_nat),
    ("tokens of SFT", _of_policy("length", "baseline")),
    ("tokens of PPO", _of_policy("length", "policy")),
    ("SFT ended by itself", _of_policy("eos_rate", "baseline")),
    ("PPO ended by itself", _of_policy("eos_rate", "policy")),
    ("distinct-2 of SFT", _of_policy("distinct2", "baseline")),
    ("distinct-2 of PPO", _of_policy("distinct2", "policy")),
    ("reward model, held-out pairs", _fact("Held-out pair accuracy")),
    ("longer wins", _fact("Baseline: the longer completion wins")),
    ("a perfect model would reach", _fact("Accuracy of a perfect model on these annotators")),
    ("annotators agree", _agreement),
)
BEST = tuple(
    (f"{label}, n = {n}", _best(n, what))
    for n in (2, 4, 8, 16)
    for what, label in (
        ("judged", "sentiment"),
        ("score", "score"),
        ("kl", "KL, at most"),
        ("per nat", "sentiment gained per nat, at least"),
    )
)
TIMES = (*((stage, _minutes(stage)) for stage in STAGES), ("all", _total))


if __name__ == "__main__":
    main()

"""`python -m experiments.exact_optimum.acceptance`: every run that this project's PPO has to pass, and its verdict."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rlhf.progress import quiet

if TYPE_CHECKING:
    from experiments.exact_optimum.experiment import Result, Settings

FLOORS = {"A": 0.97, "A-shared": 0.98, "A, other rewards": 0.96, "B": 0.95}
"""Least share of the gap that must be closed."""


def failures(kind: str, result: Result) -> list[str]:
    """What is wrong with a run, in words."""
    found = []
    if result.closed < FLOORS[kind]:
        found.append(f"closed {result.closed:.1%}, not {FLOORS[kind]:.0%}")
    if result.identity_error >= 1e-6:
        found.append(f"identity broken by {result.identity_error:.0e}")
    if kind == "A":
        allowed = {"kl": 0.08, "score": 0.05, "length": 0.08}
        gaps = {name: abs(getattr(result.trained, name) - getattr(result.optimum, name)) for name in allowed}
        found += [f"{name} is {gaps[name]:.3f} from the optimum's" for name in allowed if gaps[name] > allowed[name]]
    return found


def runs() -> list[tuple[str, Settings]]:
    """What is run, by kind."""
    from experiments.exact_optimum.experiment import Settings

    return [
        *(("A", Settings("A", seed=seed)) for seed in range(5)),
        ("A-shared", Settings("A-shared")),
        *(("A, other rewards", Settings("A", reward_seed=seed)) for seed in (1, 2, 3)),
        *(("B", Settings("B", seed=seed)) for seed in range(3)),
    ]


def main() -> int:
    """Print a line for each run; the exit status is 1 where one fails."""
    quiet()
    from experiments.exact_optimum.experiment import run

    failed = 0
    print(f"{'world':18}{'seed':>6}{'closed':>9}{'KL':>8}{'score':>8}{'length':>8}{'seconds':>9}  verdict")
    for kind, settings in runs():
        result = run(settings)
        wrong, at = failures(kind, result), result.trained
        failed += bool(wrong)
        seed = settings.seed if settings.reward_seed is None else settings.reward_seed
        numbers = f"{result.closed:9.2%}{at.kl:8.3f}{at.score:8.3f}{at.length:8.3f}{result.seconds:9.0f}"
        print(f"{kind:18}{seed:6}{numbers}  {'; '.join(wrong) or 'ok'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

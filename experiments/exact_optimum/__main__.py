"""Train in a world whose best policy is known, and print how near to it PPO came."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlhf.progress import quiet

if TYPE_CHECKING:
    from experiments.exact_optimum.experiment import Result, Settings


def main() -> None:
    """Parse, run, print."""
    quiet()  # before torch and transformers are imported
    from experiments.exact_optimum.experiment import ENVS, Settings, run
    from experiments.exact_optimum.faults import FAULTS

    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m experiments.exact_optimum", description=__doc__)
    parser.add_argument("--env", choices=ENVS, default=default.env)
    parser.add_argument("--seed", type=int, default=default.seed, help="of PPO's random numbers")
    parser.add_argument("--beta", type=float, default=default.beta, help="weight of the KL penalty")
    parser.add_argument("--reward-seed", type=int, help="another reference and reward table (B: another reference)")
    parser.add_argument("--updates", type=int, default=default.updates)
    parser.add_argument("--fault", choices=FAULTS, help="a mistake to plant, to see what it costs")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    settings = Settings(**options)
    result = run(settings)
    print(json.dumps(record(settings, result)) if as_json else table(settings, result))


def record(settings: Settings, result: Result) -> dict[str, Any]:
    """The run as one JSON object."""
    trained = result.trained
    numbers = {"closed": result.closed, "kl": trained.kl, "score": trained.score, "length": trained.length}
    return asdict(settings) | numbers | {"identity_error": result.identity_error} | asdict(result)


def table(settings: Settings, result: Result) -> str:
    """The run as a person reads it."""
    fault = f", fault {settings.fault}" if settings.fault else ""
    lines = [
        f"{settings.env}, beta {settings.beta:g}, seed {settings.seed}, {settings.updates} updates{fault}",
        f"{'':10}{'J':>9}{'score':>9}{'KL':>9}{'length':>9}{'P(EOS)':>9}",
    ]
    for name, at in (("reference", result.reference), ("PPO", result.trained), ("optimum", result.optimum)):
        numbers = (at.objective, at.score, at.kl, at.length, at.finished)
        lines.append(f"{name:10}" + "".join(f"{number:9.4f}" for number in numbers))
    return "\n".join(
        [
            *lines,
            f"gap closed {result.closed:.2%} of the way to J = {result.best:.4f}, in {result.seconds:.0f} s",
            f"identity J* - J = beta KL(pi || pi*) holds to {result.identity_error:.0e}",
        ]
    )


if __name__ == "__main__":
    main()

"""`python -m experiments.benchmarks.equal_samples --runs RUN ...`: does our PPO learn as much per sample as TRL 1.12's?

For each finished run of the demo, TRL trains the run's SFT policy against the run's reward model: on the prompts that
our PPO had, in another order, with its episodes, batch, minibatches, epochs, KL coefficient (k1), clipping, GAE,
temperature, limit and penalty for a missing EOS. Both optimise the same number: the reward model's calibration goes
into the last layer of TRL's copy, and that copy reads EOS at the end of a completion that was cut off, as ours does;
the scores of some texts are compared before anything is trained. What differs is the method: TRL trains all weights
and a value model of its own, which starts from the reward model, in fp32; ours trains what the run did. So TRL gets a
learning rate of its own: each of `--peer_learning_rate` is tried on the first run, and the best by score is taken.

Then both policies answer the same held-out prompts, drawn with the same random numbers. The difference of their scores,
by prompt, is in standard deviations of the SFT policy's scores; intervals are 95 %, from a bootstrap over prompts.
Accepted if the lower end of the interval over all runs is above -0.1. What is finished is kept in `--output`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import record
from experiments.benchmarks.ppo.learning import Run, check_scores, evaluated, load_run, peer_answers
from experiments.benchmarks.ppo.peer_environment import FOLDER, PEER, peer_python
from rlhf.progress import quiet, say
from rlhf.statistics import Estimate, bootstrap_mean

ACCEPTED_ABOVE = -0.1
RESAMPLES = 2000


def main() -> int:
    """Train what is missing, compare, print; the exit status is 1 where the result is not accepted."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.equal_samples", description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished runs of the demo")
    parser.add_argument("--peer_learning_rate", type=float, nargs="+", default=[3e-6, 1e-5, 3e-5])
    parser.add_argument("--peer_bf16", action="store_true", help="compute TRL's updates in bf16, not fp32")
    parser.add_argument("--num_prompts", type=int, default=256, help="held out, with 2 samples of each policy")
    parser.add_argument("--output", type=Path, default=Path("runs/equal_samples"), help="keeps what is finished")
    parser.add_argument("--peer", type=Path, default=FOLDER, help="the peer's virtual environment")
    record.add_json_flag(parser)
    given = parser.parse_args()
    quiet()
    origin = record.origin("experiments.benchmarks.equal_samples", given, seed=0)
    result = origin | {"peer": PEER} | compare(given, peer_python(given.peer))
    record.publish(result, table(result), json_to=given.json)
    return 0 if result["accepted"] else 1


def compare(given: argparse.Namespace, python: Path) -> dict[str, Any]:
    """Everything but the settings."""
    runs = [
        load_run(folder, given.output, num_prompts=given.num_prompts, bf16=given.peer_bf16) for folder in given.runs
    ]
    if len({run.seed for run in runs}) < len(runs):
        raise SystemExit("two runs have the same seed: give each seed once")
    gaps = {run.name: check_scores(run, python) for run in runs}
    searched = [search(runs[0], rate, python) for rate in given.peer_learning_rate]
    rate = max(searched, key=lambda tried: tried["score"])["learning_rate"]
    pairs = [pair_of(run, rate, python) for run in runs]
    total = pooled([pair.differences for pair in pairs])
    return {
        "largest_score_gap": gaps,
        "searched": searched,
        "learning_rate": rate,
        "runs": {pair.name: pair.numbers for pair in pairs},
        "difference": vars(total),
        "accepted": total.low > ACCEPTED_ABOVE,
    }


def search(run: Run, rate: float, python: Path) -> dict[str, float]:
    """The peer's score on the first run with a learning rate."""
    answers = peer_answers(run, rate, python)
    say(f"TRL with a learning rate of {rate:g} on {run.name}: score {answers.score}, KL {answers.kl}")
    return {"learning_rate": rate, "score": answers.score.value, "kl": answers.kl.value}


@dataclass(frozen=True)
class Pair:
    """Both policies of one run."""

    name: str
    differences: np.ndarray
    """Of each prompt, ours - TRL's, in standard deviations of the SFT policy's scores."""
    numbers: dict[str, Any]


def pair_of(run: Run, rate: float, python: Path) -> Pair:
    """Train and sample what is missing of a run, and compare."""
    ours = evaluated(run, run.ours, "ours")
    peer = peer_answers(run, rate, python)
    found = differences(ours.scores, peer.scores, ours.sft_scores)
    numbers = {
        "sft_score": vars(ours.sft_score),
        "ours_score": vars(ours.score),
        "peer_score": vars(peer.score),
        "ours_kl": vars(ours.kl),
        "peer_kl": vars(peer.kl),
        "difference": vars(pooled([found])),
    }
    return Pair(run.name, found, numbers)


def differences(ours: np.ndarray, peer: np.ndarray, sft: np.ndarray) -> np.ndarray:
    """(prompts,) ours - TRL's, means over samples, in standard deviations of SFT's; scores are (prompts, samples)."""
    return (ours.mean(1) - peer.mean(1)) / sft.std()


def pooled(of_runs: Sequence[np.ndarray], *, seed: int = 0) -> Estimate:
    """Mean of the runs' means with a 95 % interval; prompts are resampled within runs, and the runs stay."""
    if len(of_runs) == 1:
        return bootstrap_mean(of_runs[0], seed=seed, resamples=RESAMPLES)
    rng = np.random.default_rng(seed)
    drawn = [[rng.choice(run, len(run)).mean() for run in of_runs] for _ in range(RESAMPLES)]
    low, high = np.quantile(np.mean(drawn, 1), [0.025, 0.975])
    return Estimate(float(np.mean([run.mean() for run in of_runs])), float(low), float(high))


COLUMNS = ("sft_score", "ours_score", "peer_score", "ours_kl", "peer_kl", "difference")
HEADER = ("", "score of SFT", "of ours", "of TRL", "KL of ours", "KL of TRL", "ours - TRL, deviations")


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each run, and one for all."""
    rows = [[name, *(_cell(run[column]) for column in COLUMNS)] for name, run in result["runs"].items()]
    means = [f"{np.mean([run[column]['value'] for run in result['runs'].values()]):.3f}" for column in COLUMNS[:-1]]
    rows.append(["all", *means, f"**{_cell(result['difference'])}**"])
    lines = [f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
    tried = ", ".join(f"{each['learning_rate']:g}: {each['score']:.3f}" for each in result["searched"])
    verdict = "accepted" if result["accepted"] else "not accepted"
    return "\n".join(
        [
            *lines,
            "",
            f"TRL's learning rate: {result['learning_rate']:g} (tried, with the score on the first run: {tried})",
            f"{verdict}: the lower end over all runs must be above {ACCEPTED_ABOVE}",
        ]
    )


def _cell(estimate: Mapping[str, float]) -> str:
    return str(Estimate(**estimate))


if __name__ == "__main__":
    sys.exit(main())

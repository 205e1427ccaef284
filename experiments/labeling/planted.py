"""Plant faults in simulated annotators, and count how often they are found and how often the intervals hold the truth.

`python -m experiments.labeling.planted --datasets 200 --json`
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from experiments.labeling.people import PEOPLE, World, rankings
from labeling_ui.agreement import agreement, agreement_with_others
from labeling_ui.annotators import AnnotatorReport, annotator_reports
from labeling_ui.intervals import Rate
from labeling_ui.raters import accuracy
from rlhf.statistics import wilson

PROMPTS = 160
"""With four of eight people on each prompt everybody ranks about 80."""
POPULATION = 8_000
"""Prompts from which the true agreement is counted."""
BY_NAME = {person.name: person for person in PEOPLE}


@dataclass(frozen=True)
class Share:
    """How many of how many, with Wilson's interval."""

    name: str
    share: float
    low: float
    high: float
    hits: int
    of: int


@dataclass(frozen=True)
class Planted:
    """Over all data sets: what was recovered, and how often intervals held the truth, of all people and of each."""

    datasets: int
    prompts: int
    world: World
    recovered: list[Share]
    coverage: list[Share]
    coverage_by_person: list[Share]


def measure(datasets: int, *, prompts: int = PROMPTS, world: World = "choice", first_seed: int = 0) -> Planted:
    """Draw data sets, look at each as an administrator would, and count."""
    recovered: dict[str, list[bool]] = defaultdict(list)
    covered: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for seed in range(first_seed, first_seed + datasets):
        said = rankings(seed, prompts=prompts, world=world)
        reports = {report.name: report for report in annotator_reports(said, bootstrap=1000, seed=seed)}
        for name, found in _recovered(reports):
            recovered[name].append(found)
        for number, name, rate, truth in _intervals(
            reports, agreement(said, bootstrap=1000, seed=seed).without_ties, world
        ):
            covered[number, name].append((rate.low or 0) <= truth <= (rate.high or 0))
    pooled: dict[str, list[bool]] = defaultdict(list)
    for (number, _), hits in covered.items():
        pooled[number] += hits
    return Planted(
        datasets=datasets,
        prompts=prompts,
        world=world,
        recovered=[_share(name, hits) for name, hits in recovered.items()],
        coverage=[_share(name, hits) for name, hits in pooled.items()],
        coverage_by_person=[_share(f"{number}, {name}", hits) for (number, name), hits in covered.items()],
    )


def _recovered(reports: dict[str, AnnotatorReport]) -> Iterator[tuple[str, bool]]:
    """Whether the right one is flagged, and the others stand in order."""

    def highest(key: Callable[[AnnotatorReport], float | None], among: Sequence[str]) -> str:
        return max(among, key=lambda name: key(reports[name]) or 0.0)

    people = [name for name in reports if name != "spammer"]
    yield "order bias is flagged", "sway" in reports["swayed"].warnings
    yield "order bias is the strongest", highest(lambda each: each.position_bias.low, people) == "swayed"
    yield "the clicker is flagged", "guessing" in reports["clicker"].warnings
    yield (
        "the clicker is the least reliable",
        highest(lambda each: -(each.reliability.value or 0.0), people) == "clicker",
    )
    yield "the spammer is flagged", "shown_order" in reports["spammer"].warnings
    yield "the expert is the most reliable", highest(lambda each: each.reliability.value, people) == "expert"
    yield "the expert is not flagged", not reports["expert"].warnings
    for name in ("ann", "bob", "cem", "dia"):
        yield f"{name} is not flagged", not reports[name].warnings


def _intervals(
    reports: dict[str, AnnotatorReport], everyone: Rate, world: World
) -> Iterator[tuple[str, str, Rate, float]]:
    """(what, of whom, the interval, the truth). The spammer's sway has no finite truth, nor have others in `noise`."""
    truth, of_each = true_agreement(world)
    yield "agreement", "all", everyone, truth
    for name, report in reports.items():
        yield "agreement with others", name, report.agreement.without_ties, of_each[name]
        if world == "choice" and name != "spammer":
            yield "reliability", name, report.reliability, accuracy(BY_NAME[name].sharpness)
            yield "position bias", name, report.position_bias, BY_NAME[name].sway


@cache
def true_agreement(world: World) -> tuple[float, dict[str, float]]:
    """Of all pairs of annotators, and of each with the others, counted on so many prompts that it is nearly exact."""
    said = rankings(10**6, prompts=POPULATION, world=world)
    each = agreement_with_others(said, bootstrap=1)
    return agreement(said, bootstrap=1).without_ties.value or 0.0, {
        name: found.without_ties.value or 0.0 for name, found in each.items()
    }


def _share(name: str, hits: Sequence[bool]) -> Share:
    found = wilson(sum(hits), len(hits))
    return Share(name, float(np.mean(hits)), found.low, found.high, sum(hits), len(hits))


def table(planted: Planted) -> str:
    """As a person reads it."""
    lines = [f"{planted.datasets} data sets of {planted.prompts} prompts, world {planted.world}"]
    for title in ("recovered", "coverage", "coverage_by_person"):
        lines += ["", title.replace("_", " ")]
        lines += [
            f"  {s.name:36}{s.share:7.3f}  ({s.low:.3f} to {s.high:.3f})  {s.hits} of {s.of}"
            for s in getattr(planted, title)
        ]
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m experiments.labeling.planted", description=__doc__)
    parser.add_argument("--datasets", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each data set")
    parser.add_argument("--world", choices=("choice", "noise"), default="choice")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options: dict[str, Any] = vars(parser.parse_args())
    as_json = options.pop("json")
    planted = measure(options.pop("datasets"), **options)
    print(json.dumps(asdict(planted)) if as_json else table(planted))


if __name__ == "__main__":
    main()

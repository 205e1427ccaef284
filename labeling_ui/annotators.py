"""One annotator at a time: agreement, reliability, sway, consistency, known answers, pace. All with uncertainty.

Plain rankings in, numbers out. A number that would rest on too little is None, and its count says how little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.stats import binom

from labeling_ui.agreement import Agreement, agreement_with_others, by_prompt, compare, outcome
from labeling_ui.intervals import NOTHING, Rate, draw, estimate, ratio
from labeling_ui.raters import RaterModel, fit_raters
from rlhf.statistics import wilson
from rlhf.types import Ranking

ENOUGH_PAIRS = 30
"""Nobody is judged on fewer pairs of completions."""
ENOUGH_RANKINGS = 5
TOO_FAST = "too_fast"
"""The mark that the page leaves on a ranking that came faster than its words can be read."""
SWAYED = 0.1
"""Logits per place that matter: a place further up turns 2 or 3 in 100 even judgements."""

Concern = Literal["reversed", "guessing", "sway", "shown_order", "too_fast", "inconsistent", "gold"]
MEANING: dict[Concern, str] = {
    "reversed": "puts completions in the wrong order more often than not: was rank 1 taken for the worst?",
    "guessing": "cannot be told from one who ranks at random",
    "sway": "is swayed by the place on the page",
    "shown_order": "leaves nearly everything in the order shown",
    "too_fast": "is often faster than the words can be read",
    "inconsistent": "ranks the same item another way the second time, as one would at random",
    "gold": "is right on known answers no more often than chance",
}


@dataclass(frozen=True)
class AnnotatorReport:
    """What the rankings say of one annotator; `Rate.pairs` is what each number rests on."""

    name: str
    rankings: int
    agreement: Agreement
    """With all others."""
    reliability: Rate
    """Chance to order two completions right, from the rater model; see `RaterFit`."""
    position_bias: Rate
    """Logits per place; above 0 likes what stands first."""
    self_consistency: Rate
    """Share of pairs ordered alike when the same item came again, pairs with ties left out."""
    gold: Rate
    """Share of the pairs that a known answer orders that they ordered so, ties as half."""
    shown_order: Rate
    """Share of rankings that are the very order of the page. Counts rankings."""
    ties: Rate
    """Share of pairs that they tied."""
    too_fast: Rate
    """Share of rankings marked so. Counts rankings."""
    median_seconds: Rate
    """Counts rankings whose time is known."""
    warnings: tuple[Concern, ...]
    """What a person should look into; `MEANING` says it in words."""


def annotator_reports(
    rankings: Sequence[Ranking],
    *,
    repeats: Iterable[tuple[Ranking, Ranking]] = (),
    gold: Iterable[tuple[Ranking, Ranking]] = (),
    model: RaterModel | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> list[AnnotatorReport]:
    """All who have ranked, by name.

    `repeats`: (the first, the second) ranking of the same completions by the same annotator. `gold`: (what an annotator
    said, the known answer). Without `model` one is fitted to rankings and known answers, which takes a moment.
    """
    repeats, gold = list(repeats), list(gold)
    if model is None:
        model = fit_raters(rankings, gold=gold)
    others = agreement_with_others(rankings, bootstrap=bootstrap, seed=seed)
    names = sorted({each.annotator for each in (*rankings, *(one for one, _ in (*repeats, *gold)))})
    found = []
    for name in names:
        own = [ranking for ranking in rankings if ranking.annotator == name]
        again, known = ([pair for pair in pairs if pair[0].annotator == name] for pairs in (repeats, gold))
        fit = model.rater(name)
        report = AnnotatorReport(
            name=name,
            rankings=len(own),
            agreement=others.get(name, Agreement(NOTHING, NOTHING, 0)),
            reliability=_enough(fit.reliability if fit else NOTHING),
            position_bias=_enough(fit.position_bias if fit else NOTHING),
            self_consistency=_share_of_pairs(again, [compare(*pair)[:2] for pair in again], bootstrap, seed),
            gold=_share_of_pairs(known, [_right(*pair) for pair in known], bootstrap, seed),
            shown_order=_share([_is_shown_order(each) for each in own if each.presented_order]),
            ties=_share_of_pairs([(each, each) for each in own], [_ties(each) for each in own], bootstrap, seed),
            too_fast=_share([TOO_FAST in each.flags.get("marks", ()) for each in own if each.seconds is not None]),
            median_seconds=median([each.seconds for each in own if each.seconds is not None]),
            warnings=(),
        )
        found.append(replace(report, warnings=tuple(_concerns(report))))
    return found


def _enough(rate: Rate) -> Rate:
    return rate if rate.pairs >= ENOUGH_PAIRS else replace(rate, value=None, low=None, high=None)


def _share_of_pairs(
    of: Sequence[tuple[Ranking, Ranking]], parts: Sequence[np.ndarray], bootstrap: int, seed: int
) -> Rate:
    """Credit over count of `parts`, resampling prompts."""
    if not of:
        return NOTHING
    sums = by_prompt([[one] for one, _ in of], parts)
    return estimate(sums, ratio, draw(len(sums), bootstrap, seed), pairs=sums[:, 1].sum())


def _right(said: Ranking, answer: Ranking) -> np.ndarray:
    """(credit, pairs) over the pairs that the answer orders, by text: the two may list the completions differently."""
    total = np.zeros(2)
    ranks = dict(zip(answer.completions, answer.ranks, strict=True))
    for (one, first), (other, second) in combinations(zip(said.completions, said.ranks, strict=True), 2):
        known, found = outcome(ranks.get(one), ranks.get(other)), outcome(first, second)
        if known is not None and known != 0.5 and found is not None:
            total += (found if known else 1 - found, 1)
    return total


def _ties(ranking: Ranking) -> np.ndarray:
    said = [pair.outcome for pair in ranking.comparisons()]
    return np.array([said.count(0.5), len(said)], dtype=float)


def _is_shown_order(ranking: Ranking) -> bool:
    shown = [ranking.ranks[i] for i in ranking.presented_order or ()]
    return None not in shown and shown == sorted(set(shown), key=lambda rank: rank or 0)


def _share(said: Sequence[bool]) -> Rate:
    if len(said) < ENOUGH_RANKINGS:
        return replace(NOTHING, pairs=len(said))
    found = wilson(sum(said), len(said))
    return Rate(found.value, found.low, found.high, len(said))


def median(values: Sequence[float]) -> Rate:
    """The median with the interval of order statistics, whatever the distribution; None of fewer than six values."""
    count = len(values)
    if count < 6:  # the lowest and the highest of five enclose the median in 94 % of cases
        return replace(NOTHING, pairs=count)
    ordered = np.sort(values)
    below = int(binom.ppf(0.025, count, 0.5)) - 1  # P(fewer than this many lie below the median) <= 2.5 %
    return Rate(float(np.median(ordered)), float(ordered[below]), float(ordered[count - 1 - below]), count)


def _concerns(report: AnnotatorReport) -> Iterator[Concern]:
    if _below(report.reliability, 0.5):
        yield "reversed"
    elif _reaches(report.reliability, 0.5) and (report.reliability.value or 0) < 0.6:
        yield "guessing"
    if _above(report.position_bias, SWAYED) or _below(report.position_bias, -SWAYED):
        yield "sway"
    if _above(report.shown_order, 0.7):
        yield "shown_order"
    if _above(report.too_fast, 0.1):
        yield "too_fast"
    if report.self_consistency.pairs >= ENOUGH_PAIRS and _reaches(report.self_consistency, 0.5):
        yield "inconsistent"
    if report.gold.pairs >= ENOUGH_PAIRS and _reaches(report.gold, 0.5):
        yield "gold"


def _above(rate: Rate, bound: float) -> bool:
    return rate.low is not None and rate.low > bound


def _below(rate: Rate, bound: float) -> bool:
    return rate.high is not None and rate.high < bound


def _reaches(rate: Rate, bound: float) -> bool:
    """Whether the interval begins at `bound` or below."""
    return rate.low is not None and rate.low <= bound

"""How often two annotators order the same two completions alike, and whether the place on the page sways them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from labeling_ui.intervals import Rate, draw, estimate, ratio
from rlhf.data import prompt_key
from rlhf.types import Ranking


@dataclass(frozen=True)
class Agreement:
    """Pairwise agreement, ties read in two ways; a pair is two annotators and two completions of one item."""

    without_ties: Rate
    """Pairs in which either annotator saw a tie are left out: comparable with published numbers."""
    ties_as_half: Rate
    """A tie counts as agreeing by half, as if a coin had broken it."""
    items: int
    """Items that more than one annotator ranked."""


def agreement(rankings: Iterable[Ranking], *, bootstrap: int = 2000, seed: int = 0) -> Agreement:
    """Agreement over all pairs of annotators who ranked the same completions of the same prompt."""
    groups = ranked_together(rankings)
    return _agreement(groups, [_counts(group) for group in groups], bootstrap, seed)


def agreement_with_others(rankings: Iterable[Ranking], *, bootstrap: int = 2000, seed: int = 0) -> dict[str, Agreement]:
    """For each annotator the agreement with all others: only pairs of annotators of which they are one."""
    groups = ranked_together(rankings)
    found = {}
    for name in sorted({ranking.annotator for group in groups for ranking in group}):
        theirs = [group for group in groups if any(each.annotator == name for each in group)]
        found[name] = _agreement(theirs, [_counts(group, name) for group in theirs], bootstrap, seed)
    return found


def ranked_together(rankings: Iterable[Ranking]) -> list[list[Ranking]]:
    """Rankings of the same completions of the same prompt in the same round, where several annotators made them."""
    shared: dict[object, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        shared[prompt_key(ranking.prompt), ranking.completions, ranking.round].append(ranking)
    return [group for group in shared.values() if len({each.annotator for each in group}) > 1]


def by_prompt(groups: Sequence[Sequence[Ranking]], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sums of `parts`, one for each group, over the groups of the same prompt: (prompts, ...)."""
    sums: dict[str, np.ndarray] = {}
    for group, part in zip(groups, parts, strict=True):
        key = prompt_key(group[0].prompt)
        sums[key] = sums[key] + part if key in sums else part
    return np.array(list(sums.values()))


def _agreement(groups: Sequence[list[Ranking]], counts: Sequence[np.ndarray], bootstrap: int, seed: int) -> Agreement:
    totals = by_prompt(groups, counts).reshape(-1, 4)
    draws = draw(len(totals), bootstrap, seed)
    rates = [estimate(totals[:, i : i + 2], ratio, draws, pairs=totals[:, i + 1].sum()) for i in (0, 2)]
    return Agreement(*rates, items=len(groups))


def _counts(group: Sequence[Ranking], who: str | None = None) -> np.ndarray:
    """`compare` summed over the pairs of annotators of one item; with `who`, of those of which they are one."""
    totals = np.zeros(4)
    for one, other in combinations(group, 2):
        if one.annotator != other.annotator and who in (None, one.annotator, other.annotator):
            totals += compare(one, other)
    return totals


def compare(one: Ranking, other: Ranking) -> np.ndarray:
    """(alike, pairs) without ties, then (credit, pairs) with ties as half, of two rankings of the same completions."""
    totals = np.zeros(4)
    for i, j in combinations(range(len(one.ranks)), 2):
        first, second = outcome(one.ranks[i], one.ranks[j]), outcome(other.ranks[i], other.ranks[j])
        if first is None or second is None:
            continue
        credit = first * second + (1 - first) * (1 - second)
        if 0.5 not in (first, second):
            totals[:2] += (credit, 1)
        totals[2:] += (credit, 1)
    return totals


def outcome(first: int | None, second: int | None) -> float | None:
    """1 where the first is better, 0 where the second is, 0.5 for a tie, None where one is not ranked."""
    if first is None or second is None:
        return None
    return 0.5 if first == second else float(first < second)


def tie_share(rankings: Iterable[Ranking]) -> float | None:
    """Share of compared pairs that were ties."""
    outcomes = [pair.outcome for ranking in rankings for pair in ranking.comparisons()]
    return outcomes.count(0.5) / len(outcomes) if outcomes else None


def wins_by_place(rankings: Iterable[Ranking]) -> list[float | None]:
    """For each place on the page, the share of its comparisons won, ties as half; 0.5 everywhere means no bias."""
    won: dict[int, list[float]] = defaultdict(list)
    for ranking in rankings:
        for (place, first), (later, second) in combinations(enumerate(ranking.presented_order or ()), 2):
            credit = outcome(ranking.ranks[first], ranking.ranks[second])
            if credit is not None:
                won[place].append(credit)
                won[later].append(1 - credit)
    return [float(np.mean(won[place])) if place in won else None for place in range(max(won, default=-1) + 1)]

"""How often two annotators order the same two completions alike, and whether the place on the page sways them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf.data import prompt_key
from rlhf.types import Ranking


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval from a bootstrap over prompts; None where there was nothing to count."""

    value: float | None
    low: float | None
    high: float | None
    pairs: int


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
    shared: dict[object, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        shared[prompt_key(ranking.prompt), ranking.completions, ranking.round].append(ranking)
    groups = [group for group in shared.values() if len({each.annotator for each in group}) > 1]
    by_prompt: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for group in groups:
        by_prompt[prompt_key(group[0].prompt)] += _counts(group)
    counts = np.array(list(by_prompt.values())).reshape(-1, 4)
    draws = np.random.default_rng(seed).integers(len(counts), size=(bootstrap, len(counts))) if len(counts) else None
    return Agreement(_rate(counts[:, :2], draws), _rate(counts[:, 2:], draws), items=len(groups))


def _counts(group: Sequence[Ranking]) -> np.ndarray:
    """(alike, pairs) without ties, then (credit, pairs) with ties as half, for rankings of the same completions."""
    totals = np.zeros(4)
    for one, other in combinations(group, 2):
        if one.annotator == other.annotator:
            continue
        for i, j in combinations(range(len(one.ranks)), 2):
            first, second = _outcome(one.ranks[i], one.ranks[j]), _outcome(other.ranks[i], other.ranks[j])
            if first is None or second is None:
                continue
            credit = first * second + (1 - first) * (1 - second)
            if 0.5 not in (first, second):
                totals[:2] += (credit, 1)
            totals[2:] += (credit, 1)
    return totals


def _outcome(first: int | None, second: int | None) -> float | None:
    """1 where the first is better, 0 where the second is, 0.5 for a tie, None where one is not ranked."""
    if first is None or second is None:
        return None
    return 0.5 if first == second else float(first < second)


def _rate(counts: np.ndarray, draws: np.ndarray | None) -> Rate:
    """`counts` (prompts, 2) holds credit and pairs; `draws` (bootstrap, prompts) the prompts drawn each time."""
    credit, pairs = counts.sum(0)
    if draws is None or pairs == 0:
        return Rate(None, None, None, 0)
    credits, sizes = counts[draws].sum(1).T
    shares = credits[sizes > 0] / sizes[sizes > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return Rate(float(credit / pairs), float(low), float(high), int(pairs))


def tie_share(rankings: Iterable[Ranking]) -> float | None:
    """Share of compared pairs that were ties."""
    outcomes = [pair.outcome for ranking in rankings for pair in ranking.comparisons()]
    return outcomes.count(0.5) / len(outcomes) if outcomes else None


def wins_by_place(rankings: Iterable[Ranking]) -> list[float | None]:
    """For each place on the page, the share of its comparisons won, ties as half; 0.5 everywhere means no bias."""
    won: dict[int, list[float]] = defaultdict(list)
    for ranking in rankings:
        for (place, first), (later, second) in combinations(enumerate(ranking.presented_order or ()), 2):
            outcome = _outcome(ranking.ranks[first], ranking.ranks[second])
            if outcome is not None:
                won[place].append(outcome)
                won[later].append(1 - outcome)
    return [float(np.mean(won[place])) if place in won else None for place in range(max(won, default=-1) + 1)]

"""How well scores agree with people: pair accuracy with its interval, calibration, length bias, the human ceiling."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf.data import prompt_key
from rlhf.statistics import Estimate, ceiling, expected_calibration_error, pair_accuracy, win_rate
from rlhf.types import Ranking

LEAST_GAIN = 0.03
"""A reward model that beats the length of the completions by less than this has learned nothing to optimise for."""


@dataclass(frozen=True)
class Scored:
    """A ranking with the raw score and the tokens of each of its completions."""

    ranking: Ranking
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    soft: tuple[tuple[int, int, float, float], ...] = ()
    """As in `EncodedRanking`."""


@dataclass(frozen=True)
class Evaluation:
    """Agreement of scores with rankings that were not trained on. Intervals are 95 %, from a bootstrap over prompts."""

    rankings: int
    prompts: int
    pairs: int
    """Pairs in which the annotator preferred one; `accuracy` is over these."""
    ties: int
    accuracy: Estimate
    accuracy_ties_half: Estimate
    """Over all pairs: whatever the scores say of a tie counts half."""
    longer_wins: Estimate
    """Accuracy of "the longer completion is better"."""
    ece: float
    """Expected calibration error of sigmoid(score difference) over the pairs."""
    margin: float
    """Mean raw score of the preferred completion over the other."""
    kendall_tau: float
    """Mean tau-b per ranking; ties cost nothing."""
    top1: float
    """Share of rankings whose highest score is on the best level."""
    by_annotator: dict[str, Estimate]
    agreement: float | None
    """Share of pairs on which two annotators who both preferred one agree; None where no two judged the same pair."""
    agreement_pairs: int

    @property
    def ceiling(self) -> float | None:
        """Accuracy of a perfect model on single judgements."""
        return None if self.agreement is None else ceiling(self.agreement)

    @property
    def length_baseline(self) -> float:
        """Accuracy of the better rule of the two: the longer wins, or the shorter."""
        return max(self.longer_wins.value, 1 - self.longer_wins.value)

    def metrics(self) -> dict[str, float]:
        """The numbers for a tracker, under the field's names."""
        values = {
            "eval/accuracy": self.accuracy.value,
            "eval/accuracy_ties_half": self.accuracy_ties_half.value,
            "eval/longer_wins": self.longer_wins.value,
            "eval/ece": self.ece,
            "eval/kendall_tau": self.kendall_tau,
            "eval/top1": self.top1,
            "margin": self.margin,
        }
        return values if self.ceiling is None else values | {"eval/human_ceiling": self.ceiling}

    def weakness(self) -> str | None:
        """Why this model should not be optimised against; None where nothing speaks against it."""
        if self.accuracy.value >= self.length_baseline + LEAST_GAIN:
            return None
        rule = "longer" if self.longer_wins.value >= 0.5 else "shorter"
        return (
            f"accuracy {self.accuracy} on {self.pairs} held-out pairs is not {LEAST_GAIN:.2f} above the rule that the "
            f"{rule} completion wins ({self.length_baseline:.3f}): collect more rankings, or train longer"
        )


def evaluate(
    held_out: Sequence[Scored], *, agreement_from: Sequence[Ranking] = (), seed: int = 0, resamples: int = 2000
) -> Evaluation | None:
    """Measure scores against held-out rankings; None where no annotator preferred anything to anything.

    `agreement_from` are the rankings in which to look for pairs that several annotators judged.
    """
    pairs = [pair for each in held_out for pair in _pairs(each)]
    if all(pair.outcome == 0.5 for pair in pairs):
        return None
    margins = np.array([pair.margin for pair in pairs])
    outcomes = np.array([pair.outcome for pair in pairs])
    longer = np.array([pair.longer for pair in pairs])
    prompts = np.array([pair.prompt for pair in pairs])
    annotators = np.array([pair.annotator for pair in pairs])
    decided = outcomes != 0.5
    signed = np.where(outcomes == 1, margins, -margins)[decided]
    right = (np.sign(signed) + 1) / 2
    half = np.full(len(pairs), 0.5)
    half[decided] = right

    def accuracy(of: np.ndarray, rows: np.ndarray = decided) -> Estimate:
        return pair_accuracy(of[rows], outcomes[rows], prompts[rows], seed=seed, resamples=resamples)

    agreement, agreement_pairs = pair_agreement(agreement_from)
    return Evaluation(
        rankings=len(held_out),
        prompts=len({prompt_key(each.ranking.prompt) for each in held_out}),
        pairs=int(decided.sum()),
        ties=int((~decided).sum()),
        accuracy=accuracy(margins),
        accuracy_ties_half=win_rate(half, prompts, seed=seed, resamples=resamples),
        longer_wins=accuracy(longer),
        ece=expected_calibration_error(1 / (1 + np.exp(-np.abs(signed))), right),
        margin=float(signed.mean()),
        kendall_tau=_mean([_kendall_tau(each) for each in held_out]),
        top1=_mean([_top1(each) for each in held_out]),
        by_annotator={
            str(name): accuracy(margins, decided & (annotators == name)) for name in np.unique(annotators[decided])
        },
        agreement=agreement,
        agreement_pairs=agreement_pairs,
    )


def pair_agreement(rankings: Sequence[Ranking]) -> tuple[float | None, int]:
    """(share of agreement, number of judgement pairs) over pairs of completions that two annotators both ordered."""
    said: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for ranking in rankings:
        key = prompt_key(ranking.prompt)
        for pair in ranking.comparisons():
            if pair.outcome != 0.5 and pair.first != pair.second:
                swapped = pair if pair.first < pair.second else pair.swap()
                said[key, swapped.first, swapped.second][ranking.annotator] = swapped.outcome == 1
    agreed = [one == other for votes in said.values() for one, other in combinations(votes.values(), 2)]
    return (sum(agreed) / len(agreed), len(agreed)) if agreed else (None, 0)


@dataclass(frozen=True)
class _Pair:
    margin: float
    longer: int
    outcome: float
    prompt: str
    annotator: str


def _pairs(scored: Scored) -> Iterator[_Pair]:
    ranking, key = scored.ranking, prompt_key(scored.ranking.prompt)
    ranked = [(i, rank) for i, rank in enumerate(ranking.ranks) if rank is not None]
    for (i, first), (j, second) in combinations(ranked, 2):
        yield _Pair(
            margin=scored.scores[i] - scored.scores[j],
            longer=scored.lengths[i] - scored.lengths[j],
            outcome=0.5 if first == second else float(first < second),
            prompt=key,
            annotator=ranking.annotator,
        )


def _ranked(scored: Scored) -> tuple[list[int], list[float]]:
    pairs = [(rank, score) for rank, score in zip(scored.ranking.ranks, scored.scores, strict=True) if rank is not None]
    return [rank for rank, _ in pairs], [score for _, score in pairs]


def _kendall_tau(scored: Scored) -> float:
    """tau-b: concordant minus discordant pairs, over the geometric mean of the pairs that either side does not tie."""
    ranks, scores = _ranked(scored)
    people = [np.sign(other - one) for one, other in combinations(ranks, 2)]
    model = [np.sign(one - other) for one, other in combinations(scores, 2)]
    untied = math.sqrt(np.count_nonzero(people) * np.count_nonzero(model))
    return float(np.dot(people, model)) / untied if untied else math.nan


def _top1(scored: Scored) -> float:
    ranks, scores = _ranked(scored)
    return math.nan if len(set(ranks)) == 1 else float(ranks[int(np.argmax(scores))] == min(ranks))


def _mean(values: Sequence[float]) -> float:
    """Of the values that there are: a ranking that is one tie has no order to agree with."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan

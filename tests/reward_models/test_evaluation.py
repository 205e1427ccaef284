"""Evaluation against numbers worked out by hand, scipy, and simulated raters of known accuracy."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import kendalltau

from reward_models.evaluation import Scored, evaluate, pair_agreement
from rlhf.types import Ranking


def scored(ranks, scores, lengths=None, prompt="p", annotator="ann"):
    texts = tuple(f"text {i}" for i in range(len(ranks)))
    lengths = tuple(lengths or [1] * len(ranks))
    return Scored(Ranking(prompt, texts, tuple(ranks), annotator), tuple(scores), lengths)


def test_hand_counted_example():
    held_out = [
        scored((1, 2, 3), (3.0, 1.0, 2.0), (5, 9, 2), prompt="p"),  # right, right, wrong; longer wins: no, yes, yes
        scored((1, 1, None), (0.0, 4.0, 9.0), (1, 2, 3), prompt="q"),  # a tie, and one that was not ranked
        scored((2, 1), (1.0, 1.0), (4, 4), prompt="r"),  # equal scores and equal lengths count half
    ]
    found = evaluate(held_out)
    assert (found.rankings, found.prompts, found.pairs, found.ties) == (3, 3, 4, 1)
    assert found.accuracy.value == pytest.approx(2.5 / 4)
    assert found.accuracy_ties_half.value == pytest.approx(3.0 / 5)
    assert found.longer_wins.value == pytest.approx(2.5 / 4)
    assert found.margin == pytest.approx((2 + 1 - 1 + 0) / 4)
    assert found.top1 == pytest.approx(
        (1 + 0) / 2
    )  # the tie of all has no best; equal scores: the first listed is taken
    assert found.kendall_tau == pytest.approx(1 / 3)


def test_kendall_tau_is_scipy_over_ranked_places():
    rng = np.random.default_rng(0)
    held_out = [scored(rng.integers(1, 5, 4).tolist(), rng.normal(size=4).tolist(), prompt=f"{i}") for i in range(20)]
    taus = [kendalltau([-r for r in each.ranking.ranks], each.scores).statistic for each in held_out]
    assert evaluate(held_out).kendall_tau == pytest.approx(np.nanmean(taus))


def test_calibrated_scores_have_no_calibration_error():
    """Judgements drawn from sigmoid(score difference): a scale of 1 is calibrated, of 3 is over-confident."""
    rng = random.Random(0)

    def judged(scale):
        for i in range(4000):
            margin = rng.gauss(0, 1.5)
            first = rng.random() < 1 / (1 + math.exp(-margin))
            yield scored((1, 2) if first else (2, 1), (scale * margin, 0.0), prompt=f"{i}")

    assert evaluate(list(judged(1.0)), resamples=10).ece < 0.02
    assert evaluate(list(judged(3.0)), resamples=10).ece > 0.08


def test_interval_is_over_prompts_not_pairs():
    rng = random.Random(1)
    held_out = [
        scored((1, 2, 3, 4), (4, 3, 2, 1) if rng.random() < 0.7 else (1, 2, 3, 4), prompt=f"{i}") for i in range(100)
    ]
    accuracy = evaluate(held_out).accuracy
    clustered = 1.96 * math.sqrt(accuracy.value * (1 - accuracy.value) / 100)
    assert (accuracy.high - accuracy.low) / 2 == pytest.approx(clustered, rel=0.15)


def test_accuracy_by_annotator():
    held_out = [
        scored((1, 2), (1.0, 0.0), prompt="p", annotator="good"),
        scored((1, 2), (1.0, 0.0), prompt="q", annotator="bad"),
        scored((1, 2), (0.0, 1.0), prompt="r", annotator="bad"),
    ]
    found = evaluate(held_out).by_annotator
    assert {name: each.value for name, each in found.items()} == {"bad": 0.5, "good": 1.0}


def test_ceiling_recovers_the_accuracy_of_the_raters():
    """Raters who see the true order of a pair with probability 0.836 agree on 0.726 of them (Stiennon et al.)."""
    rng = random.Random(0)
    rankings = []
    for i in range(4000):
        for annotator in ("one", "two"):
            ranks = (1, 2) if rng.random() < 0.836 else (2, 1)
            texts = ("a", "b") if annotator == "one" else ("b", "a")  # the order in which they are listed differs
            rankings.append(Ranking(f"{i}", texts, ranks if annotator == "one" else ranks[::-1], annotator))
    agreement, count = pair_agreement(rankings)
    assert count == 4000
    assert agreement == pytest.approx(0.726, abs=0.02)
    found = evaluate([scored((1, 2), (1.0, 0.0))], agreement_from=rankings)
    assert found.ceiling == pytest.approx(0.836, abs=0.02)


def test_agreement_leaves_out_ties_single_annotators_and_repeats():
    def by(annotator, ranks, prompt="p"):
        return Ranking(prompt, ("a", "b", "c"), ranks, annotator)

    assert pair_agreement([by("one", (1, 2, 3)), by("one", (3, 2, 1)), by("two", (1, 2, 3), prompt="q")]) == (None, 0)
    # one says a > b > c; two ties a and b above c: they share the pairs (a, c) and (b, c)
    assert pair_agreement([by("one", (1, 2, 3)), by("two", (1, 1, 2))]) == (1.0, 2)
    three = [by("one", (1, 2, None)), by("two", (1, 2, None)), by("three", (2, 1, None))]
    assert pair_agreement(three) == (pytest.approx(1 / 3), 3)


def test_a_model_that_only_measures_length_is_called_weak():
    rng = np.random.default_rng(0)
    held_out = []
    for i in range(60):
        lengths = rng.permutation(4) + 1
        ranks = (np.argsort(np.argsort(-lengths)) + 1).tolist()
        held_out.append(scored(ranks, lengths.tolist(), lengths.tolist(), prompt=f"{i}"))
    found = evaluate(held_out)
    assert found.accuracy.value == found.longer_wins.value == 1.0
    assert "longer" in found.weakness()
    shorter = [Scored(each.ranking, each.scores, tuple(-n for n in each.lengths)) for each in held_out]
    assert "shorter" in evaluate(shorter).weakness()
    unrelated = [Scored(each.ranking, each.scores, (1, 1, 1, 1)) for each in held_out]
    assert evaluate(unrelated).weakness() is None


def test_nothing_preferred_is_nothing_measured():
    assert evaluate([]) is None
    assert evaluate([scored((1, 1), (0.0, 1.0))]) is None


def test_metrics_have_the_names_of_the_field():
    found = evaluate([scored((1, 2, 3), (3.0, 1.0, 2.0))])
    expected = {"eval/accuracy", "eval/ece", "eval/longer_wins", "eval/kendall_tau", "eval/top1", "margin"}
    assert expected <= found.metrics().keys()
    assert "eval/human_ceiling" not in found.metrics()
    pairs = list(combinations(range(3), 2))
    assert found.pairs == len(pairs)

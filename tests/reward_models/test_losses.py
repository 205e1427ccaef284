"""Losses against closed forms, listed numbers and brute-force enumeration of orders, in double precision."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from reward_models.losses import bradley_terry_loss, centering_loss, plackett_luce_loss

LOSSES = {
    "plackett_luce": plackett_luce_loss,
    "davidson": lambda scores, ranks, **more: bradley_terry_loss(scores, ranks, tie_strength=0.7, **more),
    "half": bradley_terry_loss,
}


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def order_probability(scores, order):
    """Plackett-Luce: draw without replacement, in proportion to exp(score)."""
    weights = [math.exp(scores[i]) for i in order]
    return math.prod(weights[k] / sum(weights[k:]) for k in range(len(weights)))


def event_probability(scores, i, below):
    """P(i comes before all of `below`), by enumerating every order of all completions."""
    orders = permutations(range(len(scores)))
    return sum(order_probability(scores, o) for o in orders if all(o.index(i) < o.index(j) for j in below))


def enumerated_nll(scores, ranks):
    total = 0.0
    for i, rank in enumerate(ranks):
        below = [j for j, other in enumerate(ranks) if rank and other > rank]
        if below:
            total -= math.log(event_probability(scores, i, below))
    return total


def one(loss, scores, ranks, **options):
    return loss(doubles(scores), torch.tensor([ranks]), **options).item()


# ------------------------------------------------------------------------------------------------- Plackett-Luce


@pytest.mark.parametrize(
    ("scores", "ranks", "expected"),
    [
        ((2.0, 1.0, 0.0), (1, 2, 3), 0.720868),
        ((2.0, 1.0, 0.0), (3, 2, 1), 3.720868),
        ((7.0, 6.0, 5.0), (1, 2, 3), 0.720868),
        ((2.0, 1.0, 0.0), (1, 2, 2), 0.407606),  # best of 3 only: cross entropy of the first choice
        ((1.5, 0.5, 0.5, -1.0), (1, 2, 3, 4), 1.597981),
        ((1.5, 0.5, 0.5, -1.0), (1, 2, 3, 3), 1.396567),  # the top 2 of 4
        ((1.0, 0.0), (1, 2), 0.313262),  # K = 2 is Bradley-Terry
    ],
)
def test_plackett_luce_has_the_listed_values(scores, ranks, expected):
    assert one(plackett_luce_loss, scores, ranks) == pytest.approx(expected, abs=1e-6)


def test_plackett_luce_has_the_listed_gradient():
    scores = doubles((2.0, 1.0, 0.0)).requires_grad_()
    plackett_luce_loss(scores, torch.tensor([[1, 2, 3]])).sum().backward()
    torch.testing.assert_close(scores.grad, doubles((-0.334759, -0.024213, 0.358972)), atol=1e-6, rtol=0)
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-12)


def test_probabilities_of_all_orders_add_up_to_one():
    orders = list(permutations((1, 2, 3, 4)))
    scores = doubles((0.3, -1.2, 2.0, 0.9)).expand(len(orders), 4)
    assert plackett_luce_loss(scores, torch.tensor(orders)).neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "ranks",
    [(1, 2, 3, 4), (4, 1, 2, 3), (1, 1, 2, 3), (1, 2, 2, 3), (1, 1, 1, 2), (2, 2, 1, 2), (1, 1, 2, 2), (2, 0, 1, 2)],
)
def test_plackett_luce_with_ties_is_the_product_of_enumerated_events(ranks):
    scores = (0.3, -1.2, 2.0, 0.9)
    assert one(plackett_luce_loss, scores, ranks) == pytest.approx(enumerated_nll(scores, ranks), abs=1e-10)


def test_a_tie_at_the_top_meets_the_same_rival_twice():
    expected = -math.log(sigmoid(1.5)) - math.log(sigmoid(0.25))
    assert one(plackett_luce_loss, (1.5, 0.25, 0.0), (1, 1, 2)) == pytest.approx(expected, abs=1e-12)


def test_smoothing_mixes_in_the_reversed_ranking():
    scores, ranks = (2.0, 1.0, 0.0), (1, 2, 3)
    expected = 0.9 * 0.720868 + 0.1 * 3.720868
    assert one(plackett_luce_loss, scores, ranks, label_smoothing=0.1) == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------- Bradley-Terry


def test_bradley_terry_has_the_listed_values():
    assert one(bradley_terry_loss, (1.0, 0.0), (1, 2)) == pytest.approx(0.313262, abs=1e-6)
    assert one(bradley_terry_loss, (2.0, 1.0, 0.0), (1, 2, 3)) == pytest.approx(0.251150, abs=1e-6)
    assert one(bradley_terry_loss, (1.0, 0.0), (1, 2), label_smoothing=0.1) == pytest.approx(0.413262, abs=1e-6)
    assert one(bradley_terry_loss, (1.0, 0.0), (1, 1)) == pytest.approx(0.813262, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "ranks", "probability"),
    [
        ((1.0, 0.0), (1, 2), 0.506480),
        ((1.0, 0.0), (1, 1), 0.307196),
        ((1.0, 0.0), (2, 1), 0.186324),
        ((0.4, 0.4), (1, 1), 1 / 3),
        ((0.4, 0.4), (1, 2), 1 / 3),
    ],
)
def test_davidson_has_the_listed_probabilities(scores, ranks, probability):
    nll = one(bradley_terry_loss, scores, ranks, tie_strength=1.0)
    assert math.exp(-nll) == pytest.approx(probability, abs=1e-6)


def test_davidson_without_tie_strength_left_is_bradley_terry():
    scores, ranks = (0.3, -1.2, 2.0, 0.9), (3, 4, 1, 2)
    assert one(bradley_terry_loss, scores, ranks, tie_strength=1e-12) == pytest.approx(
        one(bradley_terry_loss, scores, ranks), abs=1e-10
    )


@pytest.mark.parametrize("tie_strength", [None, 0.7])
def test_bradley_terry_is_the_mean_over_pairs(tie_strength):
    scores, ranks = (0.3, -1.2, 2.0, 0.9, 5.0), (2, 2, 1, 3, 0)
    pairs = []
    for i, j in combinations(range(4), 2):
        d = scores[i] - scores[j]
        d = d if ranks[i] <= ranks[j] else -d
        if tie_strength is None:
            win, tie = sigmoid(d), math.sqrt(sigmoid(d) * sigmoid(-d))
        else:
            whole = math.exp(d / 2) + math.exp(-d / 2) + tie_strength
            win, tie = math.exp(d / 2) / whole, tie_strength / whole
        pairs.append(-math.log(tie if ranks[i] == ranks[j] else win))
    expected = sum(pairs) / len(pairs)
    assert one(bradley_terry_loss, scores, ranks, tie_strength=tie_strength) == pytest.approx(expected, abs=1e-12)


def test_smoothed_loss_is_least_at_the_log_odds_of_a_true_label():
    slopes = []
    for margin in (2.197225 - 1e-4, 2.197225, 2.197225 + 1e-4):
        scores = doubles((margin, 0.0)).requires_grad_()
        bradley_terry_loss(scores, torch.tensor([[1, 2]]), label_smoothing=0.1).sum().backward()
        slopes.append(scores.grad[0, 0].item())
    assert slopes[0] < -8e-6 < -1e-6 < slopes[1] < 1e-6 < 8e-6 < slopes[2]


@pytest.mark.parametrize(("margin", "noise", "expected"), [(2, 0.164, 1.1303), (2, 0.25, 0.8020), (1, 0.1, 0.7761)])
def test_flipped_labels_compress_the_margin_as_expected(margin, noise, expected):
    """At the compressed margin, the gradient of the loss over noisy labels is 0."""
    wins = (1 - noise) * sigmoid(margin) + noise * sigmoid(-margin)
    scores = doubles((expected, 0.0)).requires_grad_()
    up = bradley_terry_loss(scores, torch.tensor([[1, 2]])).sum()
    down = bradley_terry_loss(scores, torch.tensor([[2, 1]])).sum()
    (wins * up + (1 - wins) * down).backward()
    assert scores.grad.abs().max().item() < 2e-5


# ----------------------------------------------------------------------------------------------------- centering


def test_centering_has_the_listed_value():
    assert 0.01 * one(centering_loss, (1.2, 0.4), (1, 2)) == pytest.approx(0.0256, abs=1e-12)


def test_centering_moves_the_mean_and_not_the_spread():
    scores = doubles((1.0, 2.0, 6.0, 9.0)).requires_grad_()
    centering_loss(scores, torch.tensor([[1, 2, 3, 0]])).sum().backward()
    assert scores.grad[0, :3].tolist() == pytest.approx([8.0, 8.0, 8.0])  # d (2 mean)^2 / d s = 8 mean / 3
    assert scores.grad[0, 3] == 0


# ---------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_agree_with_finite_differences(name, label_smoothing):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    ranks = torch.tensor([[1, 2, 3, 4, 5], [1, 1, 2, 0, 2], [0, 3, 0, 1, 1], [2, 2, 2, 2, 2]])
    assert gradcheck(lambda s: LOSSES[name](s, ranks, label_smoothing=label_smoothing), scores)


@pytest.mark.parametrize("name", [*LOSSES, "centering"])
def test_places_that_take_no_part_are_never_read(name):
    loss = {**LOSSES, "centering": centering_loss}[name]
    alone = doubles((0.3, -1.2, 2.0)).requires_grad_()
    padded = doubles((0.3, math.nan, -1.2, math.inf, 2.0)).requires_grad_()
    expected = loss(alone, torch.tensor([[2, 1, 1]]))
    found = loss(padded, torch.tensor([[2, 0, 1, 0, 1]]))
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(padded.grad[:, [0, 2, 4]], alone.grad)
    assert padded.grad[:, [1, 3]].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_stay_finite(name):
    scores = doubles((500.0, -500.0, 0.0)).float().requires_grad_()
    loss = LOSSES[name](scores, torch.tensor([[3, 1, 1]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_only_the_judgement_counts(name, data):
    """Invariant to the order in which completions are listed, to a common shift, and to gaps in the ranks."""
    count = data.draw(st.integers(2, 6))
    scores = data.draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    shift = data.draw(st.floats(-20, 20))
    expected = one(LOSSES[name], scores, ranks)
    listed = one(LOSSES[name], [scores[i] + shift for i in order], [2 * ranks[i] for i in order])
    assert listed == pytest.approx(expected, abs=1e-9)


def test_a_ranking_that_is_one_tie_says_nothing_to_plackett_luce_and_something_to_davidson():
    scores = doubles((1.0, 0.0)).requires_grad_()
    plackett_luce_loss(scores, torch.tensor([[1, 1]])).sum().backward()
    assert scores.grad.abs().max() == 0
    bradley_terry_loss(scores, torch.tensor([[1, 1]]), tie_strength=1.0).sum().backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 1]


def test_maximum_likelihood_recovers_the_scores_that_made_the_rankings():
    """All orders of 3 weighted by their true probability: the minimum is at the true scores, up to a shift."""
    truth = (0.8, -0.5, 0.1)
    orders = list(permutations(range(3)))
    weights = torch.tensor([order_probability(truth, o) for o in orders], dtype=torch.float64)
    ranks = torch.tensor([[o.index(i) + 1 for i in range(3)] for o in orders])
    for loss in (plackett_luce_loss, bradley_terry_loss):
        scores = doubles(truth).requires_grad_()
        (loss(scores.expand(len(orders), 3), ranks) * weights).sum().backward()
        assert scores.grad.abs().max().item() < 1e-12

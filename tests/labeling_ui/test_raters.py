"""The rater model against quadrature, finite differences, choix and plain counting."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import choix
import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import expit

from labeling_ui.choices import number
from labeling_ui.likelihood import Marginal, marginal, mode, settle
from labeling_ui.raters import accuracy, fit_raters
from rlhf.types import Ranking


def said(annotator: str, *ranks: int | None, prompt: str = "p", order: tuple[int, ...] | None = None) -> Ranking:
    return Ranking(prompt, tuple("abcdefghi"[: len(ranks)]), ranks, annotator, order)


def value(rankings: list[Ranking], parameters: list[tuple[float, float, float]]) -> float:
    return evaluated(rankings, np.array(parameters)).value


def evaluated(rankings: list[Ranking], parameters: np.ndarray) -> Marginal:
    numbered = number(rankings, sorted({each.annotator for each in rankings}))
    shape = len(numbered.texts), max(map(len, numbered.texts))
    return marginal(parameters, numbered.choices, settle(parameters, numbered.choices, *shape))


def pairs_of(
    seed: int, prompts: int, people: dict[str, tuple[float, float]], overlap: int | None = None
) -> list[Ranking]:
    """Two completions each, no ties: by comparing logistic noise, once for each person."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        gap = math.sqrt(2) * rng.standard_normal()
        chosen = rng.choice(len(people), overlap or len(people), replace=False)
        for name, (sharpness, sway) in (list(people.items())[each] for each in chosen):
            first = int(rng.integers(2))  # which of the two stands first
            pull = sharpness * gap + (sway if first == 0 else -sway)
            ranks = (1, 2) if rng.logistic() < pull else (2, 1)
            found.append(said(name, *ranks, prompt=str(prompt), order=(first, 1 - first)))
    return found


@pytest.mark.parametrize("sharpness", [0.5, 1.5, 4.0])
def test_the_likelihood_of_a_pair_is_davidsons_integrated_over_the_gap(sharpness: float) -> None:
    """One annotator, two completions, b = 0.4, nu = 0.3: by quadrature over the difference of the qualities."""
    sway, log_nu = 0.4, math.log(0.3)

    def chance(outcome: float, gap: float) -> float:
        d = sharpness * gap + sway  # `a` stands first
        total = math.exp(d / 2) + math.exp(-d / 2) + 0.3
        return {1.0: math.exp(d / 2), 0.5: 0.3, 0.0: math.exp(-d / 2)}[outcome] / total

    for ranks, outcome in (((1, 2), 1.0), ((1, 1), 0.5), ((2, 1), 0.0)):
        exact = integrate.quad(lambda g, o=outcome: chance(o, g) * stats.norm.pdf(g, scale=math.sqrt(2)), -20, 20)[0]
        both = [said("x", *ranks, order=(0, 1)), said("tie", 1, 1, prompt="q")]  # so that ties are possible at all
        tie = integrate.quad(
            lambda g: 0.3 / (2 * math.cosh(sharpness * g / 2) + 0.3) * stats.norm.pdf(g, scale=2**0.5), -20, 20
        )[0]
        found = math.exp(value(both, [(sharpness, sway, log_nu), (sharpness, sway, log_nu)])) / tie
        assert found == pytest.approx(exact, rel=0.03)


def test_integral_and_posterior_are_those_of_a_million_drawn_qualities() -> None:
    """Three completions, four rankings: everything from qualities drawn from the prior, weighted by the likelihood."""
    rankings = [said("a", 1, 2, 3), said("b", 1, 3, 2), said("c", 2, 1, 3), said("d", 1, 2, 3)]
    sharpness = (1.0, 1.5, 0.7, 4.0)
    quality = np.random.default_rng(0).standard_normal((1_000_000, 3))
    likelihood = np.ones(len(quality))
    for ranking, beta in zip(rankings, sharpness, strict=True):
        worth = np.exp(beta * quality[:, np.argsort([rank or 0 for rank in ranking.ranks])])
        likelihood *= worth[:, 0] / worth.sum(1) * worth[:, 1] / worth[:, 1:].sum(1)
    found = evaluated(rankings, np.array([(beta, 0.0, -2.0) for beta in sharpness]))
    assert found.value == pytest.approx(math.log(likelihood.mean()), abs=0.02)
    mean = likelihood @ quality / likelihood.sum()
    assert found.quality[0] == pytest.approx(mean, abs=0.03)
    covariance = (likelihood[:, None] * (quality - mean)).T @ (quality - mean) / likelihood.sum()
    assert found.covariance[0] == pytest.approx(covariance, abs=0.05)
    assert found.effective[0] > 20


def test_without_quality_every_order_has_the_same_chance_and_all_outcomes_sum_to_one() -> None:
    """beta = 0 leaves sway and ties: the chances of all 13 weak orders of three, each as it is written down."""
    places, sway, log_nu = (2, 0, 1), 0.5, math.log(0.4)
    order = tuple(int(i) for i in np.argsort(places))
    weak = [ranks for ranks in np.ndindex(3, 3, 3) if sorted(set(ranks)) == list(range(len(set(ranks))))]
    assert len(weak) == 13
    chances = []
    for ranks in weak:
        rankings = [said("x", *(rank + 1 for rank in ranks), order=order), said("y", 1, 1, 1, prompt="q")]
        apart = value(rankings[1:], [(0.0, 0.0, log_nu)])
        chances.append(math.exp(value(rankings, [(0.0, sway, log_nu), (0.0, 0.0, log_nu)]) - apart))
    assert sum(chances) == pytest.approx(1, abs=0.03)
    strength = np.exp(-sway * np.array(places))
    sets = [each for size in (1, 2, 3) for each in combinations(range(3), size)]
    weight = {each: 0.4 ** (len(each) - 1) * np.prod(strength[list(each)]) ** (1 / len(each)) for each in sets}
    first = weight[(1,)] / sum(weight.values())
    second = weight[(0, 2)] / (weight[(0,)] + weight[(2,)] + weight[(0, 2)])
    assert chances[weak.index((1, 0, 1))] == pytest.approx(first * second, rel=0.03)


def test_gradient_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    rankings = []
    for prompt, name in ((p, n) for p in range(6) for n in "xyz"):
        size = 3 + prompt % 3
        ranks = [None if rng.random() < 0.1 else int(rng.integers(1, size + 1)) for _ in range(size)]
        rankings.append(said(name, *ranks, prompt=str(prompt), order=tuple(rng.permutation(size).tolist())))
    numbered = number(rankings, list("xyz"))
    assert {group.text.shape[1] for group in numbered.choices} >= {2, 3, 4}
    at = rng.normal((1.2, 0.2, -1.0), 0.7, (3, 3))
    points = settle(at, numbered.choices, len(numbered.texts), 5)
    at += 0.3  # the points stay, wherever the parameters go
    found = marginal(at, numbered.choices, points)
    for place in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[place] = 1e-5
        up, down = (marginal(at + sign * step, numbered.choices, points).value for sign in (1, -1))
        assert found.gradient[place] == pytest.approx((up - down) / 2e-5, abs=1e-7)


def test_the_most_likely_qualities_are_choixs() -> None:
    """Annotators of sharpness 1 and a standard normal prior: choix's MAP with alpha = 1/2 (a penalty of alpha s^2)."""
    orders = [[0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3], [0, 1, 3, 2]]
    rankings = [said(f"r{i}", *(order.index(text) + 1 for text in range(4))) for i, order in enumerate(orders)]
    numbered = number(rankings, sorted({each.annotator for each in rankings}))
    found, _ = mode(np.tile([1.0, 0.0, -3.0], (4, 1)), numbered.choices, np.zeros((1, 4)))
    expected = choix.opt_rankings(4, orders, alpha=0.5, tol=1e-12)
    assert found[0] == pytest.approx(expected - expected.mean(), abs=1e-6)


def test_accuracy_is_that_of_drawn_pairs() -> None:
    assert accuracy(0) == pytest.approx(0.5)
    one, other = np.random.default_rng(0).standard_normal((2, 400_000))
    for sharpness in (-1.0, 0.7, 4.0):
        assert accuracy(sharpness) == pytest.approx(expit(sharpness * np.abs(one - other)).mean(), abs=1.5e-3)


def test_position_bias_alone_is_the_logit_of_how_often_the_first_wins() -> None:
    """Nobody else ranks, so nothing is known of quality; 150 of 200 times the one above wins. Exact for sharpness 0."""
    rankings = [said("x", *((1, 2) if i < 150 else (2, 1)), prompt=str(i), order=(0, 1)) for i in range(200)]
    fitted = fit_raters(rankings).raters[0]
    found = evaluated(rankings, np.array([[0.0, math.log(3), -1.5]]))
    assert found.gradient[0, 1] == pytest.approx(0, abs=1e-6)
    assert found.value == pytest.approx(150 * math.log(0.75) + 50 * math.log(0.25), rel=0.01)
    assert fitted.position_bias.low is not None
    assert 0.3 < fitted.position_bias.low < math.log(3) < (fitted.position_bias.high or 0)


def test_who_is_who() -> None:
    people = {"sharp": (4.0, 0.0), "dull": (0.8, 0.0), "wrong": (-1.5, 0.0), "top": (1.5, 1.5), "bottom": (1.5, -1.5)}
    model = fit_raters(pairs_of(1, 300, people, overlap=3))
    fits = {fit.name: fit for fit in model.raters}
    reliability = {name: fit.reliability.value or 0 for name, fit in fits.items()}
    assert reliability["sharp"] > reliability["top"] > reliability["dull"] > 0.5 > reliability["wrong"]
    assert (fits["wrong"].reliability.high or 1) < 0.5
    for name, (sharpness, sway) in people.items():
        fit = fits[name]
        assert fit.reliability.value == pytest.approx(accuracy(sharpness), abs=0.09), name
        assert (fit.position_bias.low or 0) < sway < (fit.position_bias.high or 0), name


def test_the_unknown_are_like_the_others() -> None:
    rankings = pairs_of(1, 200, {"a": (2.0, 0.0), "b": (2.0, 0.0), "c": (2.0, 0.0)})
    model = fit_raters([*rankings, said("new", 1, 2, prompt="0", order=(0, 1))])
    new, known = model.rater("new"), model.rater("a")
    assert new is not None
    assert known is not None
    assert new.reliability.pairs == 1
    assert abs(new.sharpness - known.sharpness) < 1.0
    assert (new.reliability.high or 1) - (new.reliability.low or 0) > 2 * (
        (known.reliability.high or 1) - (known.reliability.low or 0)
    )
    assert model.rater("nobody") is None
    assert fit_raters([]).raters == ()


def test_pairs_that_nobody_else_ranked_do_not_count_for_reliability() -> None:
    model = fit_raters([said("x", 1, 2, 3), said("y", 1, 2, 3), said("x", 1, 2, 3, 4, prompt="q")])
    x = model.rater("x")
    assert x is not None
    assert (x.reliability.pairs, x.position_bias.pairs) == (3, 9)


def test_gold_decides_between_two_who_contradict_each_other() -> None:
    orders = {"right": (1, 2, 3), "left": (3, 2, 1)}
    rankings = [said(name, *ranks, prompt=str(i)) for i in range(20) for name, ranks in orders.items()]
    answers = [said("editor", 2, 1, 3, prompt=f"gold {i}") for i in range(20)]
    told = {"right": (2, 1, 3), "left": (2, 3, 1)}
    gold = [(said(name, *told[name], prompt=str(each.prompt)), each) for each in answers for name in told]
    model = fit_raters(rankings, gold=gold)
    assert [fit.name for fit in model.raters] == ["left", "right"]
    left, right = model.raters
    assert (left.reliability.high or 1) < 0.5 < (right.reliability.low or 0)
    assert {(label.chosen, label.rejected) for label in model.labels} == {("a", "b"), ("b", "c"), ("a", "c")}
    assert not any("gold" in str(label.prompt) for label in model.labels)


def test_labels_by_hand() -> None:
    """Equal annotators: agreement makes a label sure, contradiction even, and a tie is one half."""
    rankings = [said(name, 1, 2, prompt="sure") for name in "xyz"]
    rankings += [said("x", 1, 2, prompt="torn"), said("y", 2, 1, prompt="torn")]
    rankings += [said("x", 1, 1, prompt="tie"), said("y", 1, 1, prompt="tie")]
    labels = {label.prompt: label for label in fit_raters(rankings).labels}
    assert (labels["sure"].chosen, labels["sure"].rejected) == ("a", "b")
    assert labels["sure"].probability > 0.65
    assert labels["torn"].probability == pytest.approx(0.5, abs=0.02)
    assert labels["tie"].probability == pytest.approx(0.5, abs=0.02)
    assert all(0 < label.weight < 1 for label in labels.values())
    assert labels["tie"].entropy == pytest.approx(1, abs=0.01)
    assert labels["sure"].entropy < 0.95


def test_labels_are_calibrated_and_weights_know_what_is_sure() -> None:
    """Against the true quality: a label of 0.8 wins 80 % of the judgements of a new annotator of typical sharpness."""
    rng = np.random.default_rng(5)
    rankings, quality = [], {}
    for prompt in range(400):
        quality[str(prompt)] = dict(zip("abc", rng.standard_normal(3).tolist(), strict=True))
        for name in rng.choice(list("vwxyz"), 3, replace=False):
            noisy = 1.5 * np.array(list(quality[str(prompt)].values())) + rng.gumbel(size=3)
            ranks = stats.rankdata(-noisy).astype(int)
            rankings.append(
                said(str(name), *ranks.tolist(), prompt=str(prompt), order=tuple(rng.permutation(3).tolist()))
            )
    labels = fit_raters(rankings).labels
    stated = np.array([label.probability for label in labels])
    true = expit(
        1.5
        * np.array(
            [quality[str(each.prompt)][each.chosen] - quality[str(each.prompt)][each.rejected] for each in labels]
        )
    )
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 1.0)):
        within = (stated >= low) & (stated < high)
        assert true[within].mean() == pytest.approx(stated[within].mean(), abs=0.04)


def test_a_text_that_stands_twice_counts_once_and_order_does_not_matter() -> None:
    twice = Ranking("p", ("a", "b", "a"), (1, 2, 1), "x")
    numbered = number([twice], ["x"])
    assert numbered.texts == [{"a": 0, "b": 1}]
    assert numbered.pairs.tolist() == [[1]]
    assert number([Ranking("p", ("a", "b", "a"), (1, 2, 3), "x")], ["x"]).choices == []
    rankings = pairs_of(2, 30, {"a": (2.0, 0.0), "b": (1.0, 0.3)})
    turned = [
        Ranking(
            r.prompt, r.completions[::-1], r.ranks[::-1], r.annotator, tuple(1 - i for i in r.presented_order or ())
        )
        for r in reversed(rankings)
    ]
    for one, other in zip(fit_raters(rankings).raters, fit_raters(turned).raters, strict=True):
        assert one.position_bias.value == pytest.approx(other.position_bias.value, abs=1e-3)
        assert one.reliability.value == pytest.approx(other.reliability.value, abs=1e-3)


def test_all_orders_of_three_have_the_chance_of_plackett_luce() -> None:
    """With sharpness 0 the places alone decide, and no integral is left."""
    strength = np.exp(-0.7 * np.arange(3))
    for order in permutations(range(3)):
        ranks = [order.index(i) + 1 for i in range(3)]
        left, chance = list(order), 1.0
        while len(left) > 1:
            chance *= strength[left[0]] / strength[left].sum()
            left = left[1:]
        assert value([said("x", *ranks, order=(0, 1, 2))], [(0.0, 0.7, -1.0)]) == pytest.approx(
            math.log(chance), abs=0.01
        )

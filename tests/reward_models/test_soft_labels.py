"""Reward training from soft labels: the loss, the file, the stage; and that they beat a majority with clickers."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from labeling_ui.raters import fit_raters
from reward_models import stage
from reward_models.learner import soft_targets
from reward_models.losses import soft_pair_loss
from reward_models.preferences import load_soft_labels, prepare
from rlhf.config import RewardConfig, Tracking
from rlhf.models import load_tokenizer
from rlhf.rankings import write_rankings
from rlhf.soft_labels import SoftLabel, consensus, write_soft_labels
from rlhf.types import ConfigError, Ranking


def test_loss_by_hand_and_its_gradient_in_closed_form():
    scores = torch.tensor([[1.0, 0.0, -2.0], [3.0, float("nan"), 1.0]], dtype=torch.float64, requires_grad=True)
    soft = [((0, 1, 0.8, 1.0), (2, 1, 0.5, 0.25)), ((2, 0, 0.5, 1.0),)]
    probability, weight = (each.double() for each in soft_targets(soft, scores))
    loss = soft_pair_loss(scores, probability, weight)
    first = -0.8 * math.log(expit(1.0)) - 0.2 * math.log(expit(-1.0))
    second = -0.5 * math.log(expit(-2.0)) - 0.5 * math.log(expit(2.0))
    tie = -0.5 * math.log(expit(-2.0)) - 0.5 * math.log(expit(2.0))
    assert loss.tolist() == pytest.approx([(first + 0.25 * second) / 2, tie], abs=1e-7)
    loss.sum().backward()
    pull, other = (expit(1.0) - 0.8) / 2, 0.25 * (expit(-2.0) - 0.5) / 2
    expected = [[pull, -pull - other, other], [-(expit(-2.0) - 0.5), 0.0, expit(-2.0) - 0.5]]
    assert np.allclose(scores.grad.numpy(), expected, atol=1e-7)


def test_gradient_is_autograds_and_no_label_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    chance, weight = torch.rand(2, 2, 4, 4, generator=generator, dtype=torch.float64).triu(1)
    assert torch.autograd.gradcheck(lambda s: soft_pair_loss(s, chance, weight), (scores,))
    assert soft_pair_loss(scores, chance, torch.zeros_like(weight)).tolist() == [0, 0]


def test_all_labels_of_a_prompt_are_in_one_element(tmp_path, tiny_model_folder):
    labels = [SoftLabel("the film is", " good", " bad", 0.9, 0.7), SoftLabel("the film is", " bad", " dull", 0.6, 0.4)]
    labels += [SoftLabel("it was", " a", " b", 0.5, 0.3), SoftLabel("it was", " a", " c", 0.7, 0.0)]
    path = str(tmp_path / "soft_labels.jsonl")
    write_soft_labels(path, labels)
    assert load_soft_labels(path) == labels
    write_rankings(tmp_path / "rankings.jsonl", [Ranking("p", ("a", "b"), (1, 2), "x")])
    assert load_soft_labels(str(tmp_path / "rankings.jsonl")) == []
    tokenizer = load_tokenizer(str(tiny_model_folder))
    limits = {"held_out": 0.0, "max_prompt_tokens": 64, "max_completion_tokens": 64, "ties_teach": True}
    film, it = prepare(consensus(labels), tokenizer, soft=labels, **limits).train
    assert film.ranking.completions == (" good", " bad", " dull")
    assert film.soft == ((0, 1, 0.9, 0.7), (1, 2, 0.6, 0.4))
    assert it.soft == ((0, 1, 0.5, 0.3),)  # of weight 0, nothing is known


@pytest.fixture
def config(tmp_path, tiny_model_folder):
    return RewardConfig(
        model=str(tiny_model_folder),
        rankings=str(tmp_path / "soft_labels.jsonl"),
        soft_labels=True,
        output=str(tmp_path / "reward"),
        held_out=0.25,
        epochs=3.0,
        batch_size=8,
        learning_rate=3e-3,
        precision="fp32",
        tracking=Tracking(wandb="off"),
    )


def test_the_stage_learns_from_soft_labels(config):
    texts = (" good .", " bad .", " dull .")
    labels = []
    for number in range(60):
        shown = tuple(f"{text[:-2]} {word} ." for text, word in zip(texts, ("film", "plot", "end"), strict=True))
        labels += [SoftLabel(f"film {number} is", shown[0], shown[1], 0.85, 0.6)]
        labels += [SoftLabel(f"film {number} is", shown[0], shown[2], 0.9, 0.6)]
    write_soft_labels(config.rankings, labels)
    result = stage.run(config)
    assert result.evaluation is not None
    lines = Path(config.output, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("train/loss") for line in lines]
    known = [loss for loss in losses if loss is not None]
    assert known[-1] < known[0]
    assert known[-1] > 0.6 * 0.32  # less than the entropy of the labels there is not: ln 2 of 0.85 and 0.9
    with pytest.raises(ConfigError, match="leave `annotators` out"):
        stage.run(replace(config, annotators=["me"]))


def test_soft_labels_asked_for_and_not_there(config, tmp_path):
    write_rankings(tmp_path / "hard.jsonl", [Ranking("p", ("a", "b"), (1, 2), "x")])
    with pytest.raises(ConfigError, match=r"give the soft_labels\.jsonl that `rlhf label` writes"):
        stage.run(replace(config, rankings=str(tmp_path / "hard.jsonl")))
    with pytest.raises(ConfigError, match="once two annotators have ranked the same item"):
        stage.run(replace(config, rankings=str(tmp_path / "none.jsonl")))


def test_they_beat_the_majority_where_two_of_four_click_at_random():
    """A linear score of four features is learned from soft labels, and from the majority of each pair: which direction
    is nearer to the true one? Nobody tells which annotators click at random."""
    rng = np.random.default_rng(0)
    truth = np.array([1.0, -0.7, 0.4, 0.2])
    features, rankings = {}, []
    for prompt in range(120):
        drawn = rng.standard_normal((3, 4))
        names = tuple(f"{prompt}.{i}" for i in range(3))
        features |= dict(zip(names, drawn, strict=True))
        for annotator, sharpness in (("a", 2.0), ("b", 2.0), ("click", 0.0), ("clack", 0.0)):
            noisy = sharpness * drawn @ truth + rng.gumbel(size=3)
            ranks = tuple((np.argsort(np.argsort(-noisy)) + 1).tolist())
            rankings.append(Ranking(f"prompt {prompt}", names, ranks, annotator, tuple(rng.permutation(3).tolist())))
    soft = [(each.chosen, each.rejected, each.probability, each.weight) for each in fit_raters(rankings).labels]
    votes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for ranking in rankings:
        for pair in ranking.comparisons():
            votes[pair.first, pair.second].append(pair.outcome)
    majority = [(one, other, (np.sign(np.mean(said) - 0.5) + 1) / 2, 1.0) for (one, other), said in votes.items()]

    def nearness(labels):
        gaps = torch.tensor(np.array([features[one] - features[other] for one, other, _, _ in labels]))
        chance, weight = (torch.tensor(np.array([label[i] for label in labels])) for i in (2, 3))

        def objective(weights):
            at = torch.tensor(weights, requires_grad=True)
            scores = torch.stack([gaps @ at, torch.zeros(len(labels), dtype=torch.float64)], dim=1)
            place = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
            loss = soft_pair_loss(scores, chance[:, None, None] * place, weight[:, None, None] * place).mean()
            loss.backward()
            return loss.item(), at.grad.numpy()

        found = minimize(objective, np.zeros(4), jac=True, method="BFGS").x
        return found @ truth / np.linalg.norm(found) / np.linalg.norm(truth)

    assert nearness(soft) > nearness(majority)
    assert nearness(soft) > 0.97

"""One optimiser step, however it is cut into micro-batches; the order of the data; the checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reward_models import learner as learner_module
from reward_models.learner import Learner, ranked_scores, warmup_then_linear
from reward_models.losses import plackett_luce_loss
from reward_models.preferences import encode_ranking
from rlhf import checkpoint
from rlhf.config import LastLayers, RewardConfig
from rlhf.models import load_classifier, load_tokenizer
from rlhf.types import Ranking, UserError

WORDS = ["good", "bad", "dull", "funny and clever", "long and sad", "not bad", "the best of the year"]
CONFIG = RewardConfig(
    batch_size=6, micro_batch_size=2, learning_rate=1e-3, warmup_share=0.0, precision="fp32", center_coef=0.05
)


@pytest.fixture
def tokenizer(tiny_model_folder):
    return load_tokenizer(str(tiny_model_folder))


@pytest.fixture
def rankings(tokenizer):
    """13 rankings of 2 to 5 completions, some with ties and some only partly ranked."""
    found = []
    for i in range(13):
        count = 2 + i % 4
        texts = tuple(f" {WORDS[(i + k) % len(WORDS)]} ." for k in range(count))
        ranks = tuple(1 + (i + k) % count if k % 3 or i % 2 else 1 for k in range(count))
        ranks = (*ranks[:-1], None) if count > 3 and i % 5 == 0 else ranks
        found.append(encode_ranking(Ranking(f"film {i} is", texts, ranks, "a"), tokenizer, max_completion_tokens=32))
    return found


def learner_of(folder, tokenizer, rankings, trainable="full", **changes):
    classifier = load_classifier(str(folder), tokenizer, trainable=trainable, seed=1)
    return Learner(replace(CONFIG, **changes), classifier, rankings, pad=tokenizer.pad_token_id)


def gradients(learner):
    return {name: weight.grad.clone() for name, weight in learner.weights.items() if weight.grad is not None}


def test_padded_scores_stand_at_their_ranks(tiny_model_folder, tokenizer, rankings):
    learner = learner_of(tiny_model_folder, tokenizer, rankings)
    scores, ranks = ranked_scores(learner.classifier, rankings, pad=learner.pad, dtype=torch.float32)
    for row, encoded in enumerate(rankings):
        kept = [encoded.rows[i] for i in encoded.ranked]
        torch.testing.assert_close(scores[row, : len(kept)], learner.scores(kept), atol=1e-5, rtol=0)
        expected = [encoded.ranking.ranks[i] for i in encoded.ranked]
        assert ranks[row].tolist() == expected + [0] * (ranks.shape[1] - len(expected))


@pytest.mark.parametrize("loss", ["plackett_luce", "bradley_terry"])
def test_gradient_does_not_depend_on_micro_batches(tiny_model_folder, tokenizer, rankings, loss):
    found = []
    for size in (1, 4, 13):
        learner = learner_of(
            tiny_model_folder, tokenizer, rankings, loss=loss, batch_size=13, micro_batch_size=size, max_grad_norm=1e9
        )
        found.append((learner.step(0), gradients(learner)))
    first_step, first = found[0]
    assert max(gradient.abs().max() for gradient in first.values()) > 1e-2
    for step, other in found[1:]:
        assert step.loss == pytest.approx(first_step.loss, abs=1e-5)
        assert step.accuracy == first_step.accuracy
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, first[name], atol=2e-5, rtol=0)


def short_of_memory(monkeypatch, most):
    """A batch of more rankings than that does not fit; what was taken of the batch before it did."""
    plain, calls = learner_module.ranked_scores, []

    def scores(classifier, part, **options):
        calls.append(len(part))
        if len(part) > most and len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(classifier, part, **options)

    monkeypatch.setattr(learner_module, "ranked_scores", scores)
    return calls


def test_out_of_memory_halves_the_micro_batches_with_the_same_result(
    tiny_model_folder, tokenizer, rankings, monkeypatch, capsys
):
    found = []
    for faulty in (False, True):
        learner = learner_of(tiny_model_folder, tokenizer, rankings, batch_size=13, micro_batch_size=5, epochs=2.0)
        calls = short_of_memory(monkeypatch, most=3) if faulty else []
        found.append([learner.step(number) for number in range(2)] + [gradients(learner)])
    assert calls == [5, 5, *[3, 2, 3, 2, 2, 1], *[3, 2, 3, 2, 2, 1]]
    *steps, last = found[0]
    for step, other in zip(steps, found[1], strict=False):
        assert vars(other) == pytest.approx(vars(step), abs=1e-5)
    for name, gradient in found[1][-1].items():
        torch.testing.assert_close(gradient, last[name], atol=2e-5, rtol=0)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert said == [
        "reward: out of memory: micro_batch_size is halved from 5 to 3 for the rest of this run, with the same "
        "result; set micro_batch_size: 3 to avoid this"
    ]


def test_a_single_ranking_that_does_not_fit_ends_the_training(tiny_model_folder, tokenizer, rankings, monkeypatch):
    learner = learner_of(tiny_model_folder, tokenizer, rankings)
    short_of_memory(monkeypatch, most=0)
    with pytest.raises(UserError, match=r"^reward: memory does not suffice for a single ranking at a time: train"):
        learner.step(0)


def test_loss_is_the_mean_over_rankings(tiny_model_folder, tokenizer, rankings):
    """Not over completions, pairs or micro-batches: each ranking alone, then the mean."""
    learner = learner_of(tiny_model_folder, tokenizer, rankings, batch_size=13, micro_batch_size=5)
    alone = []
    with torch.no_grad():
        for encoded in rankings:
            scores, ranks = ranked_scores(learner.classifier, [encoded], pad=learner.pad, dtype=torch.float32)
            centred = 0.05 * (2 * scores.mean()) ** 2
            alone.append((plackett_luce_loss(scores, ranks)[0] + centred).item())
    scored = learner.score(rankings)
    assert learner.loss(scored) == pytest.approx(sum(alone) / 13, abs=1e-5)
    assert learner.step(0).loss == pytest.approx(sum(alone) / 13, abs=1e-5)


def test_every_ranking_once_an_epoch_and_the_last_partial_batch_is_trained(tiny_model_folder, tokenizer, rankings):
    learner = learner_of(tiny_model_folder, tokenizer, rankings, epochs=2.0)
    names = [[encoded.ranking.prompt for encoded in learner.batch(i)] for i in range(learner.steps)]
    flat = [name for batch in names for name in batch]
    assert [len(batch) for batch in names] == [6, 6, 6, 6, 2]
    assert all(flat.count(encoded.ranking.prompt) == 2 for encoded in rankings)
    one_by_one = learner_of(tiny_model_folder, tokenizer, rankings, epochs=2.0, batch_size=1)
    order = [one_by_one.batch(i)[0].ranking.prompt for i in range(26)]
    assert sorted(order[:13]) == sorted(order[13:])
    assert order[:13] != order[13:]
    again = learner_of(tiny_model_folder, tokenizer, rankings, epochs=2.0)
    assert [[e.ranking.prompt for e in again.batch(i)] for i in range(5)] == names
    other = learner_of(tiny_model_folder, tokenizer, rankings, epochs=2.0, seed=7)
    assert [[e.ranking.prompt for e in other.batch(i)] for i in range(5)] != names


def test_half_an_epoch(tiny_model_folder, tokenizer, rankings):
    learner = learner_of(tiny_model_folder, tokenizer, rankings, epochs=0.5)
    assert (learner.total, learner.steps) == (6, 1)


@pytest.mark.parametrize("trainable", ["full", "lora", LastLayers(1), "head"], ids=str)
def test_resume_is_exact(tiny_model_folder, tokenizer, rankings, tmp_path, trainable):
    settings = {"trainable": trainable, "epochs": 2.0, "warmup_share": 0.4}
    unbroken = learner_of(tiny_model_folder, tokenizer, rankings, **settings)
    for number in range(3):
        unbroken.step(number)
    unbroken.save(tmp_path, 3)
    expected = [unbroken.step(number) for number in range(3, 5)]
    resumed = learner_of(tiny_model_folder, tokenizer, rankings, **settings)
    resumed.restore(checkpoint.latest(tmp_path))
    assert [resumed.step(number) for number in range(3, 5)] == expected
    for name, weight in unbroken.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name


def test_training_moves_what_is_trained_and_nothing_else(tiny_model_folder, tokenizer, rankings):
    learner = learner_of(tiny_model_folder, tokenizer, rankings, trainable=LastLayers(1))
    before = {name: weight.detach().clone() for name, weight in learner.classifier.named_parameters()}
    learner.step(0)
    moved = {name for name, weight in learner.classifier.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == set(learner.weights)
    assert "score.weight" in moved
    assert not any("embed" in name or "layers.0" in name for name in moved)


def test_learning_rate_goes_up_and_then_down_to_zero():
    rates = [warmup_then_linear(step, warmup=2, steps=10) for step in range(11)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


def test_divergence_stops_the_run(tiny_model_folder, tokenizer, rankings):
    learner = learner_of(tiny_model_folder, tokenizer, rankings)
    learner.classifier.score.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="diverged at step 1: lower learning_rate"):
        learner.step(0)

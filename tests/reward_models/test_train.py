"""The stage on a tiny model: it learns, is measured and calibrated, resumes exactly, and leaves what others read."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reward_models import learner, stage, train
from reward_models.model import RewardModel
from rlhf import checkpoint, contract
from rlhf.config import LastLayers, RewardConfig, Tracking
from rlhf.data import is_held_out
from rlhf.models import load_classifier, load_tokenizer
from rlhf.rankings import write_rankings
from rlhf.report_data import read_report_data
from rlhf.store import Store
from rlhf.trunk import Trunk
from rlhf.types import ConfigError, DataError, Ranking

GOOD, BAD = ["good", "funny", "clever", "warm", "great"], ["bad", "dull", "boring", "slow", "sad"]


def rankings(count: int, seed: int = 0, annotator: str = "ann") -> list[Ranking]:
    """The more good words, the better; texts of equal count are tied. Two annotators share every fourth prompt."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        kinds = rng.sample([0, 1, 2, 3, 3], 4)
        texts = tuple(" " + " ".join(rng.choice(GOOD if k < kind else BAD) for k in range(3)) + " ." for kind in kinds)
        order = sorted(set(kinds), reverse=True)
        found.append(Ranking(f"film {i} is", texts, tuple(order.index(kind) + 1 for kind in kinds), annotator))
        if i % 4 == 0:
            found.append(replace(found[-1], annotator="second"))
    return found


@pytest.fixture
def config(tmp_path: Path, tiny_model_folder: Path) -> RewardConfig:
    write_rankings(tmp_path / "rankings.jsonl", rankings(80))
    return RewardConfig(
        model=str(tiny_model_folder),
        rankings=str(tmp_path / "rankings.jsonl"),
        output=str(tmp_path / "reward"),
        held_out=0.25,
        epochs=2.0,
        batch_size=8,
        learning_rate=3e-3,
        precision="fp32",
        save_every=7,
        tracking=Tracking(wandb="off"),
    )


def records(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["plackett_luce", "bradley_terry"])
def test_it_learns_what_the_annotators_like(config, loss):
    result = stage.run(replace(config, loss=loss))
    assert result.evaluation is not None
    assert result.evaluation.accuracy.value > 0.9
    assert result.evaluation.accuracy.low > 0.8
    assert result.evaluation.agreement == 1.0
    assert result.evaluation.weakness() is None
    reward = RewardModel.load(result.model_folder, precision="fp32")
    scores = reward(["film 999 is"] * 3, [" good clever warm .", " good dull bad .", " slow sad boring ."])
    assert scores == sorted(scores, reverse=True)


def test_run_folder_holds_what_others_read(config):
    result = stage.run(config)
    folder = Path(config.output)
    assert not (folder / "checkpoints").exists()
    assert (result.score_mean, result.score_std) == pytest.approx(
        tuple(json.loads((folder / "model/config.json").read_text())[key] for key in ("score_mean", "score_std"))
    )
    assert contract.load(folder / "model").max_completion_tokens == config.max_completion_tokens
    found = {key for record in records(config.output) for key in record}
    assert {"train/loss", "train/accuracy", "grad_norm", "lr", "eval/loss", "eval/accuracy", "eval/ece"} <= found
    assert {"eval/longer_wins", "eval/kendall_tau", "eval/top1", "margin", "eval/human_ceiling"} <= found
    report = read_report_data(folder)
    assert "pair accuracy" in report.verdict
    assert len(report.samples.rows) == train.SAMPLES
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completions", "annotator", "table", "step"} == samples[0].keys()
    assert "eval/accuracy" in json.loads((folder / "summary.json").read_text())


def test_calibrated_scores_have_mean_0_and_deviation_1(config):
    result = stage.run(config)
    reward = RewardModel.load(result.model_folder, precision="fp32")
    pairs = sorted({(r.prompt, text) for r in rankings(80) for text in r.completions})
    scores = torch.tensor(reward(*zip(*pairs, strict=True)))
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_same_seed_same_numbers(config, tmp_path):
    stage.run(config)
    stage.run(replace(config, output=str(tmp_path / "again")))
    assert records(config.output) == records(str(tmp_path / "again"))


def test_interrupted_run_ends_as_an_unbroken_one(config, tmp_path, monkeypatch):
    unbroken = stage.run(config)
    broken = replace(config, output=str(tmp_path / "broken"), trainable="full")
    step = learner.Learner.step

    def fail(self, number):
        if number == 9:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(learner.Learner, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        stage.run(broken)
    assert checkpoint.latest(tmp_path / "broken/checkpoints").step == 7
    taken = []
    monkeypatch.setattr(learner.Learner, "step", lambda self, number: taken.append(number) or step(self, number))
    resumed = stage.run(broken)
    assert taken[0] == 7
    assert records(broken.output) == records(config.output)
    for name, weight in unbroken.classifier.state_dict().items():
        assert torch.equal(weight, resumed.classifier.state_dict()[name]), name


def test_checkpoint_of_other_rankings_is_not_resumed(config, tmp_path, monkeypatch):
    step = learner.Learner.step
    monkeypatch.setattr(
        learner.Learner, "step", lambda self, n: (_ for _ in ()).throw(KeyboardInterrupt) if n == 8 else step(self, n)
    )
    with pytest.raises(KeyboardInterrupt):
        stage.run(config)
    taken = []
    monkeypatch.setattr(learner.Learner, "step", lambda self, number: taken.append(number) or step(self, number))
    write_rankings(config.rankings, rankings(80, seed=1))
    stage.run(config)
    assert taken[0] == 0
    assert records(config.output)[0]["step"] == 1


def test_a_handful_of_ones_own_rankings_is_enough_to_train(config, tmp_path, capfd):
    """Nothing of three rankings need be held out: the model is trained, and said to be unmeasured."""
    mine = [r for r in rankings(12, annotator="me") if r.annotator == "me" and not is_held_out(r.prompt, 0.1)][:3]
    Store(tmp_path / "labels.db").import_rankings(mine + rankings(20, annotator="simulated-1"))
    result = stage.run(
        replace(config, rankings=str(tmp_path / "labels.db"), annotators=["me"], held_out=0.1, trainable=LastLayers(1))
    )
    assert (result.trained_on, result.evaluation) == (3, None)
    alerts = (Path(config.output) / "alerts.jsonl").read_text()
    assert "Accuracy unknown" in alerts
    assert "accuracy unknown" in capfd.readouterr().err
    assert RewardModel.load(result.model_folder, precision="fp32")(["film 1 is"], [" good ."])


def test_useless_model_is_called_so(config):
    shuffled = random.Random(0)
    noise = [replace(r, ranks=tuple(shuffled.sample(range(1, 5), 4))) for r in rankings(80)]
    write_rankings(config.rankings, noise)
    stage.run(replace(config, epochs=1.0))
    assert "Weak reward model" in (Path(config.output) / "alerts.jsonl").read_text()


def test_plain_objects_from_python(config, tmp_path):
    tokenizer = load_tokenizer(config.model)
    classifier = load_classifier(config.model, tokenizer, trainable="head")
    result = train.train(config, classifier=classifier, tokenizer=tokenizer, rankings=rankings(40))
    assert result.trained_on == sum(not is_held_out(r.prompt, 0.25) for r in rankings(40))
    assert result.classifier is classifier


def test_what_is_missing_is_named(config):
    with pytest.raises(ConfigError, match="--rankings"):
        stage.run(replace(config, rankings=None))
    with pytest.raises(DataError, match="by nobody"):
        stage.run(replace(config, annotators=["nobody"]))


def test_the_frozen_layers_run_once_and_change_nothing(config: RewardConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row passes through them once, however many epochs; the model and its scores stay the same."""
    calls: list[int] = []
    plain = Trunk.states

    def counted(self: Trunk, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(len(inputs["input_ids"]))
        return plain(self, inputs)

    monkeypatch.setattr(Trunk, "states", counted)
    config = replace(config, trainable=LastLayers(1), learning_rate=1e-3)
    once = stage.run(config)
    differing = {(r.prompt, text) for r in rankings(80) for text in r.completions}
    assert sum(calls) == len(differing) + 2, "and the two rows of the proof"
    assert not (Path(config.output) / "trunk_states.bin").exists()
    monkeypatch.setattr(Trunk, "of", staticmethod(lambda model, dtype: None))
    anew = stage.run(replace(config, output=config.output + "-anew"))
    for (name, left), right in zip(
        once.classifier.state_dict().items(), anew.classifier.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

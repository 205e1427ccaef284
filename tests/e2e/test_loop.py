"""The whole loop on a tiny random model: every stage from one YAML, twice the same, skipped when nothing changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf import cli
from rlhf.run_folder import read_records
from tests.rlhf import wandb_reader

CONFIG = Path(__file__).parents[2] / "experiments" / "sentiment" / "tiny.yaml"

PPO_KEYS = {
    *("episode", "lr", "objective/kl", "objective/kl_coef", "objective/entropy", "objective/non_score_reward"),
    *("objective/rlhf_reward", "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg"),
    *("policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var"),
    *("val/num_eos_tokens", "val/var_explained", "gen/length_mean", "gen/eos_rate", "gen/distinct2"),
    *("grad_norm/policy", "grad_norm/value", "timing/eps"),
}
REWARD_KEYS = {"train/loss", "train/accuracy", "grad_norm", "lr"}
EVALUATE_KEYS = {"eval/win_rate", "eval/win_rate_low", "eval/win_rate_high", "eval/kl", "eval/policy/score"}


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Any:
    """`run_once(name)` runs the loop in a folder of that name and returns it."""
    root = tmp_path_factory.mktemp("loop")

    def run(name: str, *arguments: str) -> Path:
        base = ["run", "--config", str(CONFIG), "--runs", str(root / name), "--sft.model", str(tiny_model_folder)]
        assert cli.main([*base, *arguments]) == 0
        return root / name / "tiny"

    return run


@pytest.fixture(scope="module")
def first(run_once: Any) -> Path:
    """The run that all tests look at."""
    return run_once("first", "--tracking.wandb", "offline")


def numbers(folder: Path, stage: str) -> list[dict[str, Any]]:
    """`metrics.jsonl` without its timings."""
    rows = read_records(folder / stage / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("timing/")} for row in rows]


def test_every_stage_leaves_its_record(first: Path) -> None:
    for stage in ("sft", "sample", "reward", "ppo", "evaluate"):
        for file in ("config.yaml", "env.json", "samples.jsonl", "report.html"):
            assert (first / stage / file).is_file(), f"{stage}/{file}"
    for stage in ("sft", "reward", "ppo"):
        assert (first / stage / "model" / "config.json").is_file(), stage
        assert (first / stage / "model" / "contract.json").is_file(), stage
    assert (first / "label" / "rankings.jsonl").is_file()
    assert (first / "report.html").is_file()


def test_metrics_hold_the_promised_keys(first: Path) -> None:
    assert set().union(*numbers_with_timings(first, "ppo")) >= PPO_KEYS
    assert set().union(*numbers(first, "reward")) >= REWARD_KEYS
    assert set().union(*numbers(first, "evaluate")) >= EVALUATE_KEYS
    assert "train/loss" in set().union(*numbers(first, "sft"))


def numbers_with_timings(folder: Path, stage: str) -> list[dict[str, Any]]:
    return read_records(folder / stage / "metrics.jsonl")


def test_the_offline_wandb_run_holds_curves_and_samples(first: Path) -> None:
    (file,) = wandb_reader.run_files(first / "ppo")
    curve = [row for row in wandb_reader.history(file) if "objective/scores" in row]
    assert len(curve) == 4
    assert [{k: v for k, v in row.items() if k in PPO_KEYS and "timing" not in k} for row in curve] == [
        {k: v for k, v in row.items() if k in PPO_KEYS} for row in numbers(first, "ppo")
    ]
    (*_, table) = wandb_reader.tables(file)
    assert table["columns"][:3] == ["prompt", "completion", "score"]
    assert len(table["data"]) == 8


def test_the_same_seed_gives_the_same_numbers(first: Path, run_once: Any) -> None:
    second = run_once("second")
    for stage in ("sft", "sample", "reward", "ppo", "evaluate"):
        assert numbers(first, stage) == numbers(second, stage), stage


def test_the_policy_moved_and_the_evaluation_is_whole(first: Path) -> None:
    evaluation = json.loads((first / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["win_rate"]["low"] <= evaluation["win_rate"]["value"] <= evaluation["win_rate"]["high"]
    assert evaluation["prompts"] == 16
    assert [best["n"] for best in evaluation["best_of_n"]] == [2]
    assert evaluation["kl"]["value"] != 0


def test_what_is_done_is_skipped_and_what_changed_is_done_again(first: Path, run_once: Any) -> None:
    stamps = {stage: (first / stage / "metrics.jsonl").stat().st_mtime_ns for stage in ("sft", "ppo", "evaluate")}
    run_once("first", "--tracking.wandb", "offline")
    assert stamps == {stage: (first / stage / "metrics.jsonl").stat().st_mtime_ns for stage in stamps}
    run_once("first", "--ppo.kl_coef", "0.2", "--tracking.wandb", "off")
    assert stamps["sft"] == (first / "sft" / "metrics.jsonl").stat().st_mtime_ns
    assert stamps["ppo"] != (first / "ppo" / "metrics.jsonl").stat().st_mtime_ns
    assert stamps["evaluate"] != (first / "evaluate" / "metrics.jsonl").stat().st_mtime_ns
    assert {row["objective/kl_coef"] for row in numbers(first, "ppo")} == {0.2}


def test_the_utility_is_never_called_in_training(run_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the simulated annotators and the evaluation's judge may know the truth."""
    from experiments.sentiment import utility

    calls: list[str] = []

    def forbidden(*_: Any) -> float:
        calls.append("called")
        raise AssertionError("the utility was called in training")

    run_once("secret", "--to", "label")
    monkeypatch.setattr(utility, "vader", forbidden)
    monkeypatch.setattr(utility, "judge", forbidden)
    folder = run_once("secret", "--from", "reward", "--to", "ppo")
    assert not calls
    assert (folder / "ppo" / "model").is_dir()


def test_plain_libraries_read_what_the_run_wrote(first: Path) -> None:
    """Interchange: transformers alone loads the policy and the reward model, and scores as we do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from reward_models.model import RewardModel

    policy = AutoModelForCausalLM.from_pretrained(first / "ppo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(first / "ppo" / "model")
    ids = tokenizer("The film is", return_tensors="pt").input_ids
    assert policy(ids).logits.shape[:2] == ids.shape

    classifier = AutoModelForSequenceClassification.from_pretrained(first / "reward" / "model").eval()
    ours = RewardModel.load(first / "reward" / "model", precision="fp32")
    prompts, completions = ["The film is", "A dull"], [" a joy.", ", slow story of a man."]
    for prompt, completion, score in zip(prompts, completions, ours.raw_scores(prompts, completions), strict=True):
        row = tokenizer(prompt, add_special_tokens=False).input_ids
        row += [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            plain = classifier(torch.tensor([row])).logits.item()
        assert plain == pytest.approx(score.item(), abs=1e-4)
    config = classifier.config
    calibrated = ours(prompts, completions)
    raw = ours.raw_scores(prompts, completions)
    assert calibrated == pytest.approx(((raw - config.score_mean) / config.score_std).tolist(), abs=1e-5)


def test_the_tables_of_the_demo_hold_what_the_run_found(
    first: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.sentiment import table

    monkeypatch.setattr("sys.argv", ["table", str(first)])
    table.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[1] for row in rows if len(row) == 2}
    found = json.loads((first / "evaluate" / "evaluation.json").read_text())
    rate = found["win_rate"]
    assert shown["win rate of PPO over SFT, by the judge"] == (
        f"**{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})**"
    )
    best = found["best_of_n"][0]
    assert shown[f"KL, at most, n = {best['n']}"] == f"{best['kl']:.2f}"
    gain = best["judged"] - found["baseline"]["judged"]["value"]
    assert shown[f"sentiment gained per nat, at least, n = {best['n']}"] == f"{gain / best['kl']:.3f}"
    seconds = sum(json.loads((first / stage / "env.json").read_text())["seconds"] for stage in table.STAGES)
    assert shown["all"] == f"**{seconds / 60:.1f}**"

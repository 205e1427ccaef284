"""Evaluation: every number against one worked out by hand, on samples that were decided in advance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf import evaluation, models
from rlhf.config import EvaluateConfig
from rlhf.evaluation import Samples
from rlhf.generation import Generated
from rlhf.types import ConfigError, UserError
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

SAID = {
    "policy": {"the film": ["good good", "bad"], "a film": ["good", "warm film"]},
    "baseline": {"the film": ["bad", "good", "dull", "good good good"], "a film": ["good", "dull", "bad", "warm"]},
}
"""Two samples a prompt of the policy; four of the baseline, of which the first two are compared."""


def config(output: Path, **changes: Any) -> EvaluateConfig:
    wanted: dict[str, Any] = {
        "samples_per_prompt": 2,
        "best_of_n": 4,
        "num_prompts": 2,
        "bootstrap": 500,
        "max_completion_tokens": 6,
        "precision": "fp32",
        "split": "all",
        "tracking": world.OFF,
    }
    return EvaluateConfig(output=str(output), **(wanted | changes))


def goods(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """The reward: how often it says good."""
    return [float(completion.count("good")) for completion in completions]


def judge(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """The truth: bad is worst, and warm is best."""
    return [float("warm" in completion) - float("bad" in completion) for completion in completions]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    """Policies are names, and their engine says what stands in SAID; the KL of the four samples is given."""

    class Engine:
        def __init__(self, name: str) -> None:
            self.said = {p: iter(texts) for p, texts in SAID[name].items()}

        def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[Generated]:
            texts = [next(self.said[tiny_tokenizer.decode(list(ids))]) for ids in prompts]
            ids = [tiny_tokenizer(text).input_ids for text in texts]
            return [
                Generated([*i, world.EOS], [0.0] * (len(i) + 1), text != "bad")
                for i, text in zip(ids, texts, strict=True)
            ]

    monkeypatch.setattr(evaluation, "sampler", lambda policy, *_, **__: Engine(policy))
    monkeypatch.setattr(evaluation, "_kl", lambda *_: np.array([1.0, 2.0, 0.5, 1.5]))


def evaluated(tokenizer: Any, output: Path, **changes: Any) -> evaluation.Evaluation:
    return evaluation.evaluate(
        config(output, **changes),
        policy="policy",
        baseline="baseline",
        tokenizer=tokenizer,
        reward=goods,
        judge=judge,
        prompts=["the film", "a film"],
    )


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_numbers_of_a_comparison_that_is_done_by_hand(batch_size: int, tiny_tokenizer: Any, tmp_path: Path) -> None:
    found = evaluated(tiny_tokenizer, tmp_path, batch_size=batch_size)
    assert (found.prompts, found.samples_per_prompt) == (2, 2)
    assert found.policy.score.value == pytest.approx((2 + 0 + 1 + 0) / 4)
    assert found.baseline.score.value == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert found.policy.judged.value == pytest.approx((0 - 1 + 0 + 1) / 4)
    assert found.baseline.judged.value == pytest.approx((-1 + 0 + 0 + 0) / 4)
    # judged: good good > bad, bad < good; good = good, warm film > dull
    assert found.win_rate.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.kl.value == pytest.approx(1.25)
    lengths = [len(tiny_tokenizer(t).input_ids) + 1 for texts in SAID["policy"].values() for t in texts]
    assert found.policy.length.value == pytest.approx(sum(lengths) / 4)
    assert found.policy.eos_rate == 0.75
    assert found.baseline.eos_rate == 0.75
    assert found.policy.distinct2 == 1.0, "'good good' and 'warm film' are the only pairs of words"
    assert found.win_rate.low <= found.win_rate.value <= found.win_rate.high


@pytest.mark.usefixtures("scripted")
def test_the_best_of_n_is_drawn_from_the_baseline_picked_by_the_reward_and_judged_by_the_judge(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    found = evaluated(tiny_tokenizer, tmp_path)
    two, four = found.best_of_n
    assert (two.n, four.n) == (2, 4)
    assert four.kl == pytest.approx(math.log(4) - 3 / 4)
    assert two.kl == pytest.approx(math.log(2) - 1 / 2)
    # the best of all four: "good good good" (3, judged 0) and "good" (1, judged 0)
    assert four.score == pytest.approx((3 + 1) / 2)
    assert four.judged == pytest.approx(0)
    # pairs of scores (0, 1, 0, 3): 3 in three of six pairs, 1 in two, 0 in one; of (1, 0, 0, 0): 1 in three of six
    assert two.score == pytest.approx(((3 * 3 + 2 * 1) / 6 + 3 / 6) / 2)


@pytest.mark.usefixtures("scripted")
def test_what_it_leaves_is_what_it_found(tiny_tokenizer: Any, tmp_path: Path) -> None:
    found = evaluated(tiny_tokenizer, tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["win_rate"]["value"] == found.win_rate.value
    assert written["best_of_n"][1]["score"] == found.best_of_n[1].score
    assert written["baseline"]["distinct2"] is None, "one word each: no pair of words to count"
    (record,) = world.records(tmp_path)
    assert record["eval/win_rate"] == found.win_rate.value
    assert record["eval/policy/score"] == found.policy.score.value
    assert record["eval/best_of_4/judged"] == found.best_of_n[1].judged
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["policy"], row["baseline"]) for row in rows] == [
        ("the film", "good good", "bad"),
        ("the film", "bad", "good"),
        ("a film", "good", "good"),
        ("a film", "warm film", "dull"),
    ]
    assert [row["policy judged"] for row in rows] == [0, -1, 0, 1]


@pytest.mark.usefixtures("scripted")
def test_a_reward_that_cannot_be_used_is_named(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="returned nan"):
        evaluation.evaluate(
            config(tmp_path),
            policy="policy",
            baseline="baseline",
            tokenizer=tiny_tokenizer,
            reward=goods,
            judge=lambda p, c: [float("nan")] * len(c),
            prompts=["the film", "a film"],
        )


def test_the_first_samples_of_every_prompt() -> None:
    of_prompt = np.repeat([0, 1, 2], 4)
    made = Samples(
        of_prompt,
        [Generated([i], [0.0], True) for i in range(12)],
        [str(i) for i in range(12)],
        np.arange(12.0),
        -np.arange(12.0),
    )
    first = made.first(2)
    assert first.completions == ["0", "1", "4", "5", "8", "9"]
    assert first.of_prompt.tolist() == [0, 0, 1, 1, 2, 2]
    assert first.scores.tolist() == [0, 1, 4, 5, 8, 9]
    assert [g.ids for g in first.generated] == [[0], [1], [4], [5], [8], [9]]
    assert made.first(4).completions == made.completions


def test_best_of_powers_of_two() -> None:
    assert [evaluation._powers_of_two(n) for n in (1, 2, 3, 4, 16)] == [[], [2], [2], [2, 4], [2, 4, 8, 16]]


# ---------------------------------------------------------------- with models


def test_the_kl_is_the_difference_of_logprobs_on_the_policys_samples(tmp_path: Path) -> None:
    policy, baseline = tiny.build("llama", seed=1), tiny.build("llama", seed=2)
    drawn = [Generated(ids, [0.0] * len(ids), True) for ids in world.COMPLETIONS]
    samples = Samples(np.repeat([0, 1, 2, 3], 2), drawn, [""] * 8, np.zeros(8), np.zeros(8))

    class Tokenizer:
        pad_token_id = world.PAD

    given = config(tmp_path, temperature=0.7, batch_size=8)
    found = evaluation._kl(given, policy, baseline, Tokenizer(), world.PROMPTS[:4], samples)
    for i, completion in enumerate(world.COMPLETIONS):
        prompt = world.PROMPTS[i // 2]
        sums = []
        for model in (policy, baseline):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / 0.7
            logprobs = logits.log_softmax(-1)
            sums.append(sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)))
        assert found[i] == pytest.approx(sums[0] - sums[1], abs=2e-4)


def run(tmp_path: Path, policy: Path, baseline: Path, **changes: Any) -> evaluation.Evaluation:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in world.TEXTS))
    wanted: dict[str, Any] = {"reward": "r:r", "num_prompts": 6, "prompts": str(prompts)}
    given = config(tmp_path / "out", policy=str(policy), baseline=str(baseline), **(wanted | changes))
    return evaluation.run(given, load_reward=lambda *_: world.length_reward)


def test_a_policy_against_itself_is_a_draw_at_no_distance(tiny_model_folder: Path, tmp_path: Path) -> None:
    """With as many samples each, both write the same texts: the random numbers are shared."""
    found = run(tmp_path, tiny_model_folder, tiny_model_folder, best_of_n=2)
    assert found.win_rate.value == 0.5
    assert abs(found.kl.value) < 1e-5
    assert found.policy == found.baseline


def test_a_policy_that_moved_is_at_a_distance_and_the_run_repeats(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    policy = world.policy(tiny_model_folder, tiny_tokenizer)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=world.seeded(1)))
    contract = models.model_contract(policy, tiny_tokenizer, max_prompt_tokens=8, max_completion_tokens=8)
    models.save_model(policy, tiny_tokenizer, tmp_path / "moved", contract=contract)
    found = run(tmp_path, tmp_path / "moved", tiny_model_folder, samples_per_prompt=4)
    assert found.kl.value > 0.05
    assert run(tmp_path, tmp_path / "moved", tiny_model_folder, samples_per_prompt=4) == found
    assert run(tmp_path, tmp_path / "moved", tiny_model_folder, samples_per_prompt=4, seed=5) != found


@pytest.mark.parametrize(
    ("missing", "flag"), [("policy", "--policy"), ("baseline", "--baseline"), ("reward", "--reward")]
)
def test_what_is_missing_is_named_with_its_flag(missing: str, flag: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    given = {"policy": "p", "baseline": "b", "reward": "r:r", "prompts": str(path)} | {missing: None}
    with pytest.raises(ConfigError, match=flag):
        evaluation.run(config(tmp_path, **given), load_reward=lambda *_: world.length_reward)

"""The estimate of a run: exact where costs are linear, silent on the disk, as clear as a run about what is wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rlhf import cli, models, ppo
from rlhf.config import LastLayers, PPOConfig, PPOExtras
from rlhf.estimate import estimate
from rlhf.estimate_report import Completions, Estimate, Lasting, Memory, Part, advice
from rlhf.gauge import Gauge
from rlhf.generation import Generated
from rlhf.probe import Budget, Sampling
from rlhf.rates import Rates
from rlhf.types import DataError, UserError
from rlhf.workload import Row, decoding
from tests.rlhf import ppo_world as world

# ---------------------------------------------------------------- a clock that is made up

TRUE = {"prompt_tokens": 2e-4, "decode_steps": 0.02, "sampled_tokens": 1e-3, "read_tokens": 3e-6}


class Clocked:
    """An engine whose seconds are linear in what it does, on a clock of its own; every second row ends half-way."""

    def __init__(self, together: int) -> None:
        self.now, self.together, self.calls = 0.0, together, 0
        self.batch_size = together

    def sync(self) -> None:
        self.now += 0.5

    def rest(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, **_: Any) -> list[Generated]:
        lengths = [max_tokens if i % 2 else 1 + max_tokens // 2 for i in range(len(prompts))]
        rows = [Row(len(prompt), length) for prompt, length in zip(prompts, lengths, strict=True)]
        self.calls += 1
        self.now += Rates(TRUE).cost(decoding(rows, together=self.together, refills=True)) * (
            3 if self.calls == 1 else 1
        )
        return [Generated([9] * length, [0.0] * length, length < max_tokens) for length in lengths]


@pytest.mark.parametrize("seconds", [8.0, 40.0])
def test_a_linear_cost_is_found_exactly_whether_there_was_time_for_all_of_it_or_not(seconds: float) -> None:
    engine = Clocked(together=16)
    prompts = [[5] * (3 + 7 * i % 20) + [i] for i in range(50)]  # no two alike: each is read
    sampling = Sampling(
        engine, prompts, limit=300, together=16, refills=True, temperature=1.0, gauge=Gauge(torch.device("cpu"))
    )
    budget = Budget(seconds, lambda: engine.now)
    sampling.run(budget, enough=16)
    assert sampling.sync_seconds == 0.5
    assert (sampling.seen_tokens == 300) == (seconds > 10)
    assert budget.left > -0.4 * seconds
    whole = decoding([Row(len(prompt), 300) for prompt in prompts], together=16, refills=True)
    assert Rates.fit(sampling.pieces).cost(whole) == pytest.approx(Rates(TRUE).cost(whole), rel=1e-6)


# ---------------------------------------------------------------- on a tiny model


def estimated(folder: Path, tokenizer: Any, output: Path, **changes: Any) -> Estimate:
    prompts = changes.pop("prompts", world.TEXTS)
    config = world.config(output, **changes)
    return estimate(
        config,
        policy=world.policy(folder, tokenizer, config.trainable),
        tokenizer=tokenizer,
        reward=world.length_reward,
        prompts=prompts,
        seconds=1.0,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": LastLayers(1)},
        {"trainable": "lora"},
        {"extras": PPOExtras(rloo_samples=2)},
        {"micro_batch_tokens": 40, "precision": "bf16"},
        {"micro_batch_tokens": 200, "micro_batch_size": 16},
    ],
    ids=["full", "last_layers", "lora", "rloo", "tokens", "tokens of more rows than there are"],
)
def test_every_part_is_told_and_nothing_is_written(
    changes: Any, tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    found = estimated(tiny_model_folder, tiny_tokenizer, tmp_path / "output", **changes)
    assert [part.name for part in found.parts] == ["sample", "score", "measure", "update"]
    assert all(part.seconds > 0 for part in found.parts)
    assert all(part.tokens > 0 and part.flops > 0 for part in found.parts if part.name != "score")
    assert found.lasting.steps == 4
    assert found.lasting.saves == 4
    assert found.lasting.value_only_steps == ("extras" not in changes)
    assert found.memory.largest_micro_batch_size == 4, "no more than batch_size / num_mini_batches"
    assert found.memory.largest_rollout_batch_size == 8
    assert 0 < found.memory.peak < found.memory.available
    assert list(tmp_path.iterdir()) == []
    assert not Path("wandb").exists()
    assert json.loads(found.to_json())["total_seconds"] == found.total_seconds


def test_the_work_is_that_of_a_run(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one length, and no token ends a completion: what a step forwards is then known to the last token."""
    monkeypatch.setattr(models, "eos_token_ids", lambda model, tokenizer: ())
    prompt = len(tiny_tokenizer("warm").input_ids)
    found = estimated(tiny_model_folder, tiny_tokenizer, tmp_path, prompts=["warm"])
    tokens = 8 * (prompt + 5 - 1)
    assert [part.tokens for part in found.parts] == pytest.approx([tokens, 0, 2 * tokens, 2 * tokens])
    assert (found.completions.mean_tokens, found.completions.cut) == (5, 1)


def test_what_a_run_refuses_an_estimate_refuses_in_the_same_words(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="there is no prompt to train on"):
        estimated(tiny_model_folder, tiny_tokenizer, tmp_path, prompts=[])
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the film"}\n')
    given = ["--reward", "math:fsum", "--prompts", str(file), "--output", str(tmp_path / "output")]
    for arguments in (given, [*given, "--model", str(tmp_path / "nowhere")], ["--model", str(tiny_model_folder)]):
        said = []
        for flags in ([], ["--estimate"]):
            assert cli.main(["ppo", *arguments, *flags]) == 2
            said.append(capsys.readouterr().err.splitlines()[-1])
        assert said[0] == said[1]


def test_a_broken_reward_is_named(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    policy = world.policy(tiny_model_folder, tiny_tokenizer)
    objects: dict[str, Any] = {"policy": policy, "tokenizer": tiny_tokenizer, "prompts": world.TEXTS}
    with pytest.raises(UserError, match="returned 0 scores"):
        estimate(config, reward=lambda prompts, completions: [], seconds=0.5, **objects)


# ---------------------------------------------------------------- what is shown

PARTS = (
    Part("sample", 5_000, 1e12, 3.0),
    Part("score", 4_000, 1e12, 1.0),
    Part("measure", 8_000, 2e12, 4.0),
    Part("update", 8_000, 6e12, 12.0),
)
SHOWN = Estimate(
    config=PPOConfig(total_episodes=1280, save_every=4, max_completion_tokens=64),
    parts=PARTS,
    lasting=Lasting(10, value_only_steps=2, value_only_update_seconds=5.0, saves=3, save_seconds=2.0),
    memory=Memory(
        3e9, 5e9, available=8e9, largest_micro_batch_size=24, largest_rollout_batch_size=128, longest_tokens=100
    ),
    completions=Completions(40.0, 0.25, sampled=128, seen_tokens=32),
    probe_seconds=21.0,
)


def shown(found: Estimate) -> str:
    written = io.StringIO()
    found.print(Console(file=written, width=160, highlight=False))
    return " ".join(written.getvalue().split())


def test_a_whole_run_is_its_steps_and_its_checkpoints() -> None:
    assert SHOWN.step_seconds == 20
    assert SHOWN.total_seconds == 8 * 20 + 2 * (20 - 12 + 5) + 3 * 2


def test_the_table_says_where_the_time_goes_and_how_much_memory_it_takes() -> None:
    text = shown(SHOWN)
    assert "update 8,000 6 12 60% 500" in text
    assert "step 25,000 10 20 100% 500" in text
    assert "The run: 10 steps, 3:12, of which 0:06 for 3 checkpoints." in text
    assert "Memory: 5.0 GB at the peak, of 8.0 GB that can be had." in text
    assert "micro_batch_size 24, rollout_batch_size 128" in text
    assert "40 tokens on average, 25% cut at 64, from 128" in text
    assert "no time for more than 32 tokens" in text
    assert "The update takes 60% of the time." in text
    assert "num_ppo_epochs 1 would save one pass of 2" in text
    assert "The memory is enough." in text


def test_advice_names_what_dominates_and_what_would_fit() -> None:
    slow = replace(SHOWN, parts=(Part("sample", 1, 1, 90.0), *PARTS[1:]))
    assert "rollout_batch_size 128 fits" in advice(slow)[0]
    tight = replace(SHOWN, memory=replace(SHOWN.memory, available=5e9, largest_micro_batch_size=8))
    assert "lower micro_batch_size from 16 to 8" in advice(tight)[1]
    assert (
        "at any micro_batch_size" in advice(replace(tight, memory=replace(tight.memory, largest_micro_batch_size=0)))[1]
    )


def test_where_tokens_bound_the_micro_batches_they_are_what_is_told() -> None:
    told = replace(SHOWN, config=PPOConfig(total_episodes=1280, micro_batch_tokens=4096))
    assert "Largest that fits: micro_batch_tokens 2400," in shown(told)
    tight = replace(told, memory=replace(SHOWN.memory, available=5e9))
    assert "lower micro_batch_tokens from 4096 to 2400" in advice(tight)[1]


def test_the_command_prints_a_table_or_one_object(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("rlhf.estimate.run", lambda config, **_: asked.append(config) or SHOWN)
    monkeypatch.setattr(ppo, "run", lambda *_, **__: pytest.fail("that is no run"))
    assert cli.main(["ppo", "--estimate", "--kl_coef", "0.125"]) == 0
    assert "One PPO step" in capsys.readouterr().out
    assert asked[0].kl_coef == 0.125
    assert cli.main(["ppo", "--estimate", "--json", "--kl_coef=0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] == 5e9
    assert cli.main(["ppo", "--json"]) == 2
    assert "give --estimate" in capsys.readouterr().err

"""A checkpoint goes on only where settings, data and the first weights are those it came from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import pipeline, ppo, sft
from rlhf.config import RewardConfig
from rlhf.origin import check_origin, origin_of
from rlhf.types import UserError
from tests.conftest import make_model_folder
from tests.rlhf import broken_runs, nothing_to_do
from tests.rlhf import ppo_world as world


@pytest.fixture
def given(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a run of two steps of PPO."""
    return {
        "config": world.config(tmp_path / "out", total_episodes=16, save_every=1, held_out=0.0),
        "policy": world.policy(tiny_model_folder, tiny_tokenizer),
        "tokenizer": tiny_tokenizer,
        "reward": world.length_reward,
        "prompts": world.TEXTS,
    }


def test_ppo_refuses_checkpoints_of_another_run(given: dict[str, Any], tiny_model_folder: Path) -> None:
    begun_with = copy.deepcopy(given["policy"].state_dict())
    ppo.train(**given)
    trained = given["policy"]
    fresh = world.policy(tiny_model_folder, given["tokenizer"])
    again = {**given, "policy": fresh}
    config = given["config"]
    with pytest.raises(UserError, match=r"other settings \(kl_coef was .* and is 0\.7\): choose another --output"):
        ppo.train(**{**again, "config": replace(config, kl_coef=0.7)})
    with pytest.raises(UserError, match=r"extras\.ema_decay was None and is 0\.5"):
        ppo.train(**{**again, "config": replace(config, extras=replace(config.extras, ema_decay=0.5))})
    with pytest.raises(UserError, match="on other data"):
        ppo.train(**{**again, "prompts": world.TEXTS[:-1]})
    with pytest.raises(UserError, match=r"began with other weights.*load that anew"):
        ppo.train(**{**given, "policy": trained})
    trained.load_state_dict(begun_with)
    for each in (again, given):
        ppo.train(**{**each, "config": replace(config, save_every=7)})  # as often as one likes


def test_fine_tuning_refuses_checkpoints_of_another_run(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path / "model", tiny_tokenizer, layers=2)
    broken_runs.fine_tune("full", tmp_path, tmp_path / "out")
    make = broken_runs.SFTConfig
    monkeypatch.setattr(broken_runs, "SFTConfig", lambda **some: make(**{**some, "learning_rate": 0.5}))
    with pytest.raises(UserError, match=r"other settings \(learning_rate was 0\.01 and is 0\.5\)"):
        broken_runs.fine_tune("full", tmp_path, tmp_path / "out")


def test_an_adapter_counts_by_what_it_adds(tiny_model_folder: Path, tiny_tokenizer: Any) -> None:
    """Its first factor is drawn anew each time that it is made; the second begins at zero."""
    config = RewardConfig()
    origins = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        adapted = world.policy(tiny_model_folder, tiny_tokenizer, "lora")
        origins.append(origin_of(config, [], adapted))
    assert origins[0] == origins[1]
    with torch.no_grad():
        next(weight for name, weight in adapted.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    with pytest.raises(UserError, match="other weights"):
        check_origin(origins[0], origin_of(config, [], adapted), Path("checkpoints"))


def test_a_stage_run_by_hand_is_done_again_by_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the marks of the old result would vouch for the new one."""
    folder = tmp_path / "reward"
    folder.mkdir()
    marks = [folder / pipeline.DONE, folder / pipeline.STARTED]
    monkeypatch.setitem(pipeline.MODULES, "reward", "tests.rlhf.nothing_to_do")
    config = RewardConfig(output=str(folder))
    for mark in marks:
        mark.write_text("{}")
    pipeline.run_stage("reward", config)
    assert [mark.exists() for mark in marks] == [True, True]
    pipeline.run_alone("reward", config)
    assert [mark.exists() for mark in marks] == [False, False]


@pytest.mark.parametrize("wrote", [False, True])
def test_a_stage_that_is_refused_leaves_the_marks_unless_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrote: bool
) -> None:
    marks = [tmp_path / pipeline.DONE, tmp_path / pipeline.STARTED]
    for mark in marks:
        mark.write_text("{}")

    def refuse(_config: Any) -> None:
        if wrote:
            (tmp_path / "config.yaml").write_text("new: true")
        raise UserError("not like this")

    monkeypatch.setattr(nothing_to_do, "run", refuse)
    monkeypatch.setitem(pipeline.MODULES, "reward", "tests.rlhf.nothing_to_do")
    with pytest.raises(UserError, match="not like this"):
        pipeline.run_alone("reward", RewardConfig(output=str(tmp_path)))
    assert [mark.exists() for mark in marks] == [not wrote, not wrote]


def test_batches_that_micro_batches_do_not_divide_keep_their_size(tmp_path: Path) -> None:
    """The trainer makes whole micro-batches only: of 4 by 8 it would make 8, of 20 it would make 16."""
    for batch, most, found in ((4, 8, (4, 1)), (20, 8, (5, 4)), (32, 8, (8, 4)), (7, 4, (1, 7))):
        config = broken_runs.SFTConfig(output=str(tmp_path), batch_size=batch, micro_batch_size=most, precision="fp32")
        arguments = sft._arguments(config, 1)
        assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == found

"""The parts of a step on a clock that is made up, and what a run and a rollout tell of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import ppo
from rlhf.stopwatch import Stopwatch
from rlhf.trunk import Trunk
from tests.rlhf import ppo_world as world


def test_a_lap_counts_since_the_one_before_and_a_part_may_come_in_pieces() -> None:
    times = iter([10.0, 11.0, 14.0, 14.5, 20.0])
    watch = Stopwatch(lambda: next(times))
    for part in ("sample", "measure", "score", "measure"):
        watch.lap(part)
    assert watch.seconds == {"sample": 1.0, "measure": 3.0 + 5.5, "score": 0.5}


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_rollout_tells_of_its_parts_in_order(frozen: int) -> None:
    model, told = world.actor_critic(), []
    trunk: Any = Trunk.of(model.policy, torch.float32, depth=frozen) if frozen else None
    world.gathered(model, world.reference(model), trunk=trunk, lap=told.append)
    assert told == ["sample", *(["measure"] if frozen else []), "score", "measure"]


def test_the_parts_of_a_step_add_up_to_it(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    ppo.train(
        world.config(tmp_path, total_episodes=16),
        policy=world.policy(tiny_model_folder, tiny_tokenizer),
        tokenizer=tiny_tokenizer,
        reward=world.length_reward,
        prompts=world.TEXTS,
    )
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        row = {name.removeprefix("timing/"): value for name, value in json.loads(line).items()}
        parts = [row[f"{part}_seconds"] for part in ("sample", "score", "measure")]
        assert all(part > 0 for part in parts)
        assert row["rollout_seconds"] == pytest.approx(sum(parts))
        assert row["eps"] == pytest.approx(8 / (row["rollout_seconds"] + row["update_seconds"]))

"""Checkpoints: what goes in comes out to the bit, damage is seen, and the old one outlives the writing of the new."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf import checkpoint
from rlhf.types import UserError

FILES = ("weights/policy.safetensors", "weights/value.safetensors", "states.pt", "state.json", "manifest.json")


def save(folder: Path, step: int, **numbers: Any) -> checkpoint.Checkpoint:
    random = torch.Generator().manual_seed(step)
    transposed = torch.randn(4, 3, generator=random).T
    return checkpoint.save(
        folder,
        step,
        weights={
            "policy": {"a": torch.randn(3, generator=random), "b": transposed},
            "value": {"c": torch.randn(2, generator=random).bfloat16()},
        },
        states={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "random": checkpoint.random_states()},
        numbers={"kl_coef": 0.1 + 0.2, **numbers},
    )


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path, 7, running={"start": {"x": 1e-17}, "alarmed": {"low entropy": 3}})
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 7
    generator = torch.Generator().manual_seed(7)
    transposed = torch.randn(4, 3, generator=generator).T
    policy = found.weights("policy")
    assert torch.equal(policy["a"], torch.randn(3, generator=generator))
    assert torch.equal(policy["b"], transposed)
    assert found.weights("value")["c"].dtype == torch.bfloat16
    assert found.states()["optimizer"]["state"][0]["step"] == 3
    assert found.numbers() == {
        "step": 7,
        "kl_coef": 0.30000000000000004,
        "running": {"start": {"x": 1e-17}, "alarmed": {"low entropy": 3}},
    }
    assert sorted(str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file()) == sorted(FILES)


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    (tmp_path / "step_000003.writing").mkdir()
    assert checkpoint.latest(tmp_path) is None, "a half-written one is no checkpoint"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["lost", "torn", "flipped"])
def test_damage_to_any_file_is_seen_and_the_one_before_is_taken(file: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step_000003", tmp_path / "kept")
    broken = save(tmp_path, 9).path
    (tmp_path / "kept").rename(tmp_path / "step_000003")
    path = broken / file
    if damage == "lost":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 3


def test_when_all_are_damaged_the_message_names_them_and_what_to_do(tmp_path: Path) -> None:
    path = save(tmp_path, 3).path
    (path / "states.pt").write_bytes(b"nothing")
    (tmp_path / "step_000001").mkdir()
    with pytest.raises(UserError) as raised:
        checkpoint.latest(tmp_path)
    message = str(raised.value)
    assert f"{path} is damaged: states.pt is not what was written" in message
    assert f"{tmp_path / 'step_000001'} is incomplete" in message
    assert f"Delete {tmp_path} to start this stage again" in message


def test_the_newest_is_the_one_with_the_highest_step_not_the_last_in_the_alphabet(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    shutil.copytree(tmp_path / "step_999999", tmp_path / "kept")
    save(tmp_path, 1_000_000)
    (tmp_path / "kept").rename(tmp_path / "step_999999")
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_only_the_newest_is_kept_and_what_a_crash_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "step_000002.writing" / "weights").mkdir(parents=True)
    (tmp_path / "step_000004.writing").mkdir()
    (tmp_path / "step_000004.writing" / "rubbish").write_text("x")
    for step in (1, 2, 4):
        save(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000004"]
    assert not (tmp_path / "step_000004" / "rubbish").exists()


def test_the_old_one_goes_only_after_the_new_one_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1).path
    events: list[str] = []
    verify, remove = checkpoint.verify, shutil.rmtree

    def verified(saved: checkpoint.Checkpoint) -> None:
        assert old.is_dir()
        verify(saved)
        events.append(f"read {saved.path.name}")

    def removed(path: Path, **options: Any) -> None:
        if Path(path).is_dir():
            events.append(f"removed {Path(path).name}")
        remove(path, **options)

    monkeypatch.setattr(checkpoint, "verify", verified)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", removed)
    save(tmp_path, 2)
    assert events == ["read step_000002", "removed step_000001"]


@pytest.mark.parametrize("moment", ["save_file", "torch.save", "seal", "rename", "verify"])
def test_a_write_that_fails_at_any_moment_leaves_the_old_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        target = {"torch.save": (torch, "save"), "rename": (Path, "rename")}.get(moment, (checkpoint, moment))
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == (2 if moment == "verify" else 1)
    assert (tmp_path / "step_000001").is_dir()
    assert save(tmp_path, 3).step == 3


def test_a_checkpoint_that_reads_back_wrong_never_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    seal = checkpoint.seal

    def sealed_then_damaged(folder: Path) -> None:
        seal(folder)
        (folder / "states.pt").write_bytes(b"the disk lies")

    monkeypatch.setattr(checkpoint, "seal", sealed_then_damaged)
    with pytest.raises(UserError, match=r"states\.pt is not what was written"):
        save(tmp_path, 2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_every_random_stream_goes_on_where_it_was() -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    random.gauss(0, 1), np.random.randn()  # both keep a second number for the next call
    states = json.loads(json.dumps(checkpoint.random_states(), default=lambda tensor: tensor.tolist()))
    states["torch"] = torch.tensor(states["torch"], dtype=torch.uint8)
    states["numpy"][1] = torch.tensor(states["numpy"][1])

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist()

    first = draw()
    assert draw() != first
    checkpoint.restore_random_states(states)
    assert draw() == first


def test_seeds_differ_in_every_part_and_never_change() -> None:
    seeds = {
        checkpoint.seed_of(seed, purpose, step, rank)
        for seed in range(4)
        for purpose in ("rollout", "update")
        for step in range(20)
        for rank in range(4)
    }
    assert len(seeds) == 4 * 2 * 20 * 4
    assert checkpoint.seed_of(1, 12) != checkpoint.seed_of(11, 2), "the parts are kept apart"
    assert checkpoint.seed_of(0, "rollout", 3, 0) == 26495174870894782, "a checkpoint of old must find its streams"
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_what_a_killed_process_left_beside_a_checkpoint_goes(tmp_path: Path) -> None:
    """Both our names and those of transformers' trainer."""
    for prefix in ("step_", "checkpoint-"):
        for name in ("2", "7", "9.writing"):
            (tmp_path / f"{prefix}{name}").mkdir()
        checkpoint.remove_others(tmp_path / f"{prefix}7")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7", "step_7"]


def test_checkpoints_removed_half_way_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than found and damaged, which would end in a message to delete them by hand."""
    folder = tmp_path / "checkpoints"
    save(folder, 3)

    def killed(path: Path, **_: Any) -> None:
        if path.is_dir():
            (path / "step_000003" / "states.pt").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove_all(folder)
    assert checkpoint.latest(folder) is None
    checkpoint.remove_all(folder)
    assert list(tmp_path.iterdir()) == []

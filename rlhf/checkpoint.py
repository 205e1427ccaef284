"""Checkpoints that can be trusted: written aside, hashed, renamed; the old one goes after the new one was read back.

Layout of `checkpoints/step_000120/`:

    weights/<name>.safetensors   trained weights by module: policy, value, ema; frozen ones come from the model's source
    states.pt                    optimiser, schedule, random states of every library
    state.json                   step, data cursor, episodes, kl_coef, running statistics: plain numbers, readable
    manifest.json                SHA-256 of every file above, written last: without it there is no checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.types import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path

    def weights(self, name: str) -> dict[str, Tensor]:
        """The trained weights saved under `name`."""
        return load_file(self.path / "weights" / f"{name}.safetensors")

    def states(self) -> dict[str, Any]:
        """Optimiser, schedule and random states."""
        return torch.load(self.path / "states.pt", weights_only=True)

    def numbers(self) -> dict[str, Any]:
        """The plain part of the state."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))


def save(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    states: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> Checkpoint:
    """Write a checkpoint, read it back, then remove the older ones."""
    final = folder / f"step_{step:06d}"
    aside = folder / f"step_{step:06d}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "weights").mkdir(parents=True)
        for name, tensors in weights.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, aside / "weights" / f"{name}.safetensors")
        torch.save(dict(states), aside / "states.pt")
        (aside / "state.json").write_text(json.dumps({"step": step, **numbers}, indent=2) + "\n", encoding="utf-8")
        seal(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # half a checkpoint would only fill the disk
        raise
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(folder)
    checkpoint = Checkpoint(step, final)
    verify(checkpoint)
    remove_others(final)
    return checkpoint


def remove_others(kept: Path) -> None:
    """Leave only this checkpoint in its folder: what a killed process was writing, or had not yet removed, goes too."""
    for other in kept.parent.glob(kept.name.rstrip("0123456789") + "*"):
        if other != kept:
            shutil.rmtree(other)


def remove_all(folder: Path) -> None:
    """Remove a folder of checkpoints, under another name first: killed half-way, it leaves no damaged ones to find."""
    aside = folder.with_name(folder.name + ".removing")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.is_dir():
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Raises UserError when there are checkpoints and all of them are damaged: starting over silently would hide it.
    """
    found = (path for path in folder.glob("step_*") if path.suffix != ".writing")
    return newest_whole([Checkpoint(int(path.name.removeprefix("step_")), path) for path in found], folder)


def newest_whole(candidates: Sequence[Checkpoint], folder: Path) -> Checkpoint | None:
    """The newest of the checkpoints in `folder` that is as it was sealed; None and UserError as for `latest`."""
    problems = []
    for checkpoint in sorted(candidates, key=lambda each: each.step, reverse=True):
        try:
            verify(checkpoint)
        except UserError as error:
            problems.append(str(error))
        else:
            return checkpoint
    if problems:
        raise UserError(f"{'; '.join(problems)}. Delete {folder} to start this stage again from its beginning")
    return None


def random_states() -> dict[str, Any]:
    """The state of every global random generator, in a form that `torch.load(weights_only=True)` reads."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put every global random generator back to where `random_states` found it."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def seed_of(*parts: object) -> int:
    """A seed that depends on every part: (seed, step, rank, purpose) name one stream of random numbers for good."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def seal(folder: Path) -> None:
    """Write the manifest, the last file of a checkpoint, and wait until all of it is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {str(path.relative_to(folder)): _hash(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def verify(checkpoint: Checkpoint) -> None:
    """Raise UserError where a file is not what was sealed."""
    try:
        manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the checkpoint {checkpoint.path} is incomplete: it has no readable {MANIFEST}") from error
    for name, expected in manifest.items():
        file = checkpoint.path / name
        if not file.is_file() or _hash(file) != expected:
            raise UserError(f"the checkpoint {checkpoint.path} is damaged: {name} is not what was written")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

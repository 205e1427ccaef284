"""What a run folder says, file by file, without what depends on the clock: two runs of one seed must say the same."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf.config import STAGES
from rlhf.run_folder import LOCK

STORED = {
    "items": "SELECT key, prompt, round FROM items ORDER BY id",
    "completions": "SELECT item_id, position, text, model, seed, settings, finished FROM completions ORDER BY 1, 2",
    "assignments": "SELECT item_id, annotator, presented_order, state FROM assignments ORDER BY id",
    "rankings": "SELECT item_id, annotator, version, active, ranks, rankings.presented_order, flags, rationale"
    " FROM rankings JOIN assignments ON assignments.id = assignment_id ORDER BY rankings.id",
}
"""What the label store holds: not the moments, and not the random keys of submits."""

TIMED = {"created_at", "seconds"}
"""Of a ranking."""


def content(folder: Path) -> dict[str, Any]:
    """Each file under `folder` with what it says; lock files apart, which say nothing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): READERS.get(path.name, _hash)(path) for path in files}


def differences(one: Path, other: Path) -> list[str]:
    """One line for each file that only one of two run folders has, or that says something else in them."""
    ours, theirs = content(one), content(other)
    only = [f"{name}: only in {one if name in ours else other}" for name in sorted(ours.keys() ^ theirs.keys())]
    return only + [f"{name}: differs" for name in ours if name in theirs and ours[name] != theirs[name]]


def stamps_of_finished(folder: Path) -> dict[str, dict[str, int]]:
    """For each stage that is done, when each of its files was written; the page is drawn anew by every command."""
    return {stage: _stamps(folder / stage) for stage in STAGES if (folder / stage / "done.json").is_file()}


def _stamps(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK, "report.html"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _nothing(_: Path) -> None:
    """That the file is there is all that is compared."""


def _fields(*names: str) -> Callable[[Path], Any]:
    return lambda path: [json.loads(path.read_text(encoding="utf-8")).get(name) for name in names]


def _metrics(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("timing/")} for row in _rows(path)]


def _rankings(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _store(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        return {name: connection.execute(query).fetchall() for name, query in STORED.items()}


def _tensors(path: Path) -> Any:
    import torch

    states = torch.load(path, weights_only=True)
    states.pop("random", None)  # of generators that nothing draws from, seeded anew in every process
    return _plain(states)


def _plain(value: Any) -> Any:
    """Nested states with tensors as lists, so that == compares them."""
    if hasattr(value, "tolist"):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


READERS: dict[str, Callable[[Path], Any]] = {
    "done.json": _nothing,  # it and `started.json` hold a fingerprint of when the stages before ended
    "env.json": _fields("stage", "seed", "status"),
    "labels.db": _store,
    "manifest.json": _nothing,  # of the files beside it
    "metrics.jsonl": _metrics,
    "optimizer.pt": _tensors,
    "rankings.jsonl": _rankings,
    "report.html": _nothing,
    "rng_state.pth": _nothing,
    "scheduler.pt": _tensors,
    "started.json": _nothing,
    "states.pt": _tensors,
    "trainer_state.json": _fields("global_step", "max_steps", "num_input_tokens_seen"),  # metrics.jsonl has the rest
    "training_args.bin": _nothing,
}
"""By file name; any other file is compared to the bit."""

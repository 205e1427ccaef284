"""Soft labels as JSON lines: what several annotators together say of two completions, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data import prompt_key
from rlhf.run_folder import write_atomically
from rlhf.sources import check_messages, check_text, numbered_rows
from rlhf.types import DataError, Prompt, Ranking

SOFT_LABELS = "soft_labels.jsonl"
"""The file's name in the label stage's folder."""


@dataclass(frozen=True)
class SoftLabel:
    """How likely an annotator is to find `chosen` better than `rejected`."""

    prompt: Prompt
    chosen: str
    rejected: str
    probability: float
    """1/2 where annotators would tie, or where nothing is known."""
    weight: float
    """0 to 1: share of what was uncertain about the two that the rankings have settled."""

    @property
    def entropy(self) -> float:
        """Of the label, in bits."""
        parts = [p * math.log2(p) for p in (self.probability, 1 - self.probability) if p > 0]
        return -sum(parts)


def write_soft_labels(path: str | Path, labels: Iterable[SoftLabel]) -> None:
    """One JSON object a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(vars(label), ensure_ascii=False) + "\n" for label in labels))


def read_soft_labels(path: str | Path) -> list[SoftLabel]:
    """All of them. Raises DataError naming file, line and field."""
    labels = []
    for line, row in numbered_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            labels.append(_label(row))
        except DataError as error:
            raise DataError(f"{path}:{line}: {str(error).removeprefix(f'{path}:{line}: ')}") from error
    if not labels:
        raise DataError(f"{path} holds no soft labels: `rlhf label` writes them where annotators ranked the same items")
    return labels


def _label(row: dict[str, Any]) -> SoftLabel:
    for name in ("prompt", "chosen", "rejected", "probability"):
        if name not in row:
            raise DataError(f"there is no {name!r}; found {', '.join(map(str, row)) or 'nothing'}")
    prompt = row["prompt"]
    return SoftLabel(
        prompt=check_messages(prompt, "prompt") if isinstance(prompt, list) else check_text(prompt, "prompt"),
        chosen=check_text(row["chosen"], "chosen", may_be_empty=True),
        rejected=check_text(row["rejected"], "rejected", may_be_empty=True),
        probability=_share(row["probability"], "probability"),
        weight=_share(row.get("weight", 1.0), "weight"),
    )


def _share(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"{name} is {value!r}, but it must be a number from 0 to 1")
    return float(value)


def by_prompt(labels: Iterable[SoftLabel]) -> dict[str, list[SoftLabel]]:
    """The labels of each prompt, under its key."""
    found: dict[str, list[SoftLabel]] = {}
    for label in labels:
        found.setdefault(prompt_key(label.prompt), []).append(label)
    return found


def consensus(labels: Iterable[SoftLabel], annotator: str = "soft labels") -> list[Ranking]:
    """One ranking a prompt: its completions by their expected number of wins, equal numbers tied."""
    rankings = []
    for group in by_prompt(labels).values():
        wins: dict[str, float] = {}
        for label in group:
            wins[label.chosen] = wins.get(label.chosen, 0.0) + label.probability - 0.5
            wins[label.rejected] = wins.get(label.rejected, 0.0) + 0.5 - label.probability
        levels = sorted({round(value, 9) for value in wins.values()}, reverse=True)
        ranks = tuple(levels.index(round(value, 9)) + 1 for value in wins.values())
        if len(wins) > 1:
            rankings.append(Ranking(group[0].prompt, tuple(wins), ranks, annotator))
    return rankings

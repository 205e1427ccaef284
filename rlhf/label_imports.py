"""What comes into a label store from elsewhere: rankings, and completions that other models wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from rlhf.rankings import BadRow, ranking_from_json
from rlhf.schema import items
from rlhf.sources import check_messages, check_text, numbered_rows
from rlhf.store import Store, add_item
from rlhf.types import Completion, DataError, Prompt, Ranking

FIELDS = {"model": str, "seed": int, "settings": dict, "finished": bool}
"""What a completion may say of itself beside its text."""


@dataclass(frozen=True)
class Imported:
    """What a file held: good rows are kept whatever the others are like."""

    rankings: int
    """New ones; those that the store had already do not count."""
    items: int
    """New prompts with completions."""
    known: int
    """Rows that changed nothing."""
    bad: tuple[BadRow, ...]


def import_file(store: Store, path: str | Path, round: int = 0) -> Imported:
    """Take the rows of a file: those with `ranks` are rankings, the others a prompt with completions to be ranked.

    Raises DataError where the file cannot be read, or the store cannot be written.
    """
    rankings: list[Ranking] = []
    sampled: list[tuple[Prompt, list[Completion]]] = []
    bad: list[BadRow] = []
    for number, row in numbered_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            if "ranks" in row:
                rankings.append(ranking_from_json(row))
            else:
                sampled.append(completions_from_json(row))
        except DataError as error:
            bad.append(BadRow(number, str(error).removeprefix(f"{path}:{number}: ")))
    new_rankings = store.import_rankings(rankings)
    new_items = _add(store, sampled, round)
    known = len(rankings) + len(sampled) - new_rankings - new_items
    return Imported(new_rankings, new_items, known, tuple(bad))


def completions_from_json(row: Mapping[str, Any]) -> tuple[Prompt, list[Completion]]:
    """A prompt and its completions, each a text or {text, model, seed, settings, finished}. Raises DataError."""
    for name in ("prompt", "completions"):
        if name not in row:
            found = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"there is no {name!r}; found {found}: a row is a prompt with completions, or a ranking")
    prompt, texts = row["prompt"], row["completions"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise DataError(f"completions is {str(texts)[:60]}, but it must be a list of at least 2")
    model = check_text(row.get("model", "imported"), "model")
    checked = check_messages(prompt, "prompt") if isinstance(prompt, list) else check_text(prompt, "prompt")
    return checked, [_completion(each, model) for each in texts]


def _completion(value: Any, model: str) -> Completion:
    if not isinstance(value, Mapping):
        return Completion(check_text(value, "a completion", may_be_empty=True), model=model, seed=0)
    text = check_text(value.get("text"), "text of a completion", may_be_empty=True)
    given = {name: value[name] for name in FIELDS if value.get(name) is not None}
    for name, each in given.items():
        if not isinstance(each, FIELDS[name]) or (FIELDS[name] is int and isinstance(each, bool)):
            raise DataError(f"{name} of a completion is {each!r}, not a {FIELDS[name].__name__}")
    if not -(2**63) <= given.get("seed", 0) < 2**63:
        raise DataError(f"seed of a completion is {given['seed']}, which has more than 64 bits")
    return Completion(text, **{"model": model, "seed": 0, **given})


def _add(store: Store, sampled: list[tuple[Prompt, list[Completion]]], round: int) -> int:
    count = sa.select(sa.func.count()).select_from(items)
    with store.write() as connection:
        before = connection.scalars(count).one()
        for prompt, texts in sampled:
            add_item(connection, prompt, texts, round)
        return connection.scalars(count).one() - before

"""What leaves a label store: rankings, preference pairs or the raw log, each with a card that says what it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from rlhf.data import write_rankings
from rlhf.event_log import head
from rlhf.judgements import standing
from rlhf.run_folder import write_atomically
from rlhf.schema import completions, events, payloads
from rlhf.store import Store
from rlhf.types import DataError, Prompt, Ranking

Ties = Literal["half", "drop"]

CARD = "README.md"
MARK = "<!-- written by `rlhf data export` -->"
"""By this a card is known to be ours, and may be written anew."""

CONTENTS = {
    "rankings": "One ranking a line. `ranks[i]` belongs to `completions[i]`: 1 is best, equal numbers are ties, null "
    "was set aside. `presented_order` lists the completions as the page showed them. Where an item was adjudicated, "
    "that ranking alone is here.",
    "preferences": "One pair of completions a row, from all pairs of each ranking. `weight` is 1; a tie is listed both "
    "ways with weight 0.5 (`tie` is true), or left out where the export was asked to. `ranking` is the number of the "
    "ranking in the store: pairs of one ranking are not independent of each other.",
    "events": "The raw log, one event a line: what was said and done, in order, each event with the hash of the one "
    "before. `body` is null where a person was erased.",
}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    rows: int
    path: Path
    card: Path


def export_rankings(store: Store, path: Path, agreement: Mapping[str, str]) -> Exported:
    """Rankings as JSON lines. `agreement` holds lines of the card, name -> value in words."""
    found = _standing(store)
    _check_file(path)
    write_rankings(path, found.values())
    return Exported(len(found), path, write_card(store, path, "rankings", found.values(), agreement))


def export_preferences(store: Store, path: Path, agreement: Mapping[str, str], ties: Ties = "half") -> Exported:
    """Pairs as JSON lines where the path ends in .jsonl, else as a new folder of Hugging Face `datasets`."""
    found = _standing(store)
    rows = list(preferences(found, ties))
    if path.suffix == ".jsonl":
        _check_file(path)
        _write_lines(path, rows)
    else:
        _save_folder(path, rows)
    return Exported(len(rows), path, write_card(store, path, "preferences", found.values(), agreement))


def export_events(store: Store, path: Path, agreement: Mapping[str, str]) -> Exported:
    """The whole log as JSON lines."""
    _check_file(path)
    rows = list(read_events(store))
    _write_lines(path, rows)
    return Exported(len(rows), path, write_card(store, path, "events", _standing(store).values(), agreement))


def read_events(store: Store) -> Iterator[dict[str, Any]]:
    """Every event with what it says, in order."""
    said = (payloads.c.annotator, payloads.c.salt, payloads.c.body)
    query = sa.select(events, *said).join(payloads).order_by(events.c.id)
    with store.read() as connection:
        for row in connection.execution_options(yield_per=1000).execute(query).mappings():
            yield {**row, "body": None if row["body"] is None else json.loads(row["body"])}


def preferences(rankings: Mapping[int, Ranking], ties: Ties = "half") -> Iterator[dict[str, Any]]:
    """Pairs of TRL's preference format, with weights. Where one prompt is a conversation, all become conversations."""
    chat = any(isinstance(each.prompt, list) for each in rankings.values())
    for number, ranking in rankings.items():
        known = {"prompt": as_turns("user", ranking.prompt) if chat else ranking.prompt}
        origin = {"ranking": number, "annotator": ranking.annotator}
        for pair in ranking.comparisons():
            tie = pair.outcome == 0.5
            if tie and ties == "drop":
                continue
            texts = (pair.first, pair.second) if pair.outcome else (pair.second, pair.first)
            for chosen, rejected in (texts, texts[::-1]) if tie else (texts,):
                sides = {"chosen": chosen, "rejected": rejected}
                shown = {name: as_turns("assistant", text) if chat else text for name, text in sides.items()}
                yield {**known, **shown, "weight": 0.5 if tie else 1.0, **origin, "tie": tie}


def as_turns(role: str, said: Prompt) -> Any:
    """A text as the one turn of a conversation; a conversation as it is."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _standing(store: Store) -> dict[int, Ranking]:
    with store.read() as connection:
        return standing(connection, resolved=True)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file, such as {path / 'export.jsonl'}")
    path.parent.mkdir(parents=True, exist_ok=True)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _save_folder(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.exists():
        raise DataError(f"{path} exists already: name a new folder, or a file that ends in .jsonl")
    if not rows:
        raise DataError("there is no pair to export: collect rankings first")
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_list(rows).save_to_disk(str(path))


# ----------------------------------------------------------------------------------------------------------- the card


def write_card(store: Store, path: Path, kind: str, rankings: Iterable[Ranking], agreement: Mapping[str, str]) -> Path:
    """Write README.md into the folder exported, or beside the file, never over one of somebody else."""
    folder = path if path.is_dir() else path.parent
    card = folder / CARD
    if card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        card = folder / f"{path.stem}.{CARD}"
    write_atomically(card, card_text(store, path.name, kind, list(rankings), agreement))
    return card


def card_text(store: Store, name: str, kind: str, rankings: list[Ranking], agreement: Mapping[str, str]) -> str:
    """The data set card in Markdown."""
    counts, log, models = store.counts(), "", ()
    with store.read() as connection:
        log = "{}:{}".format(*head(connection))
        models = connection.scalars(sa.select(completions.c.model).distinct().order_by(completions.c.model)).all()
    said = sorted(each.created_at for each in rankings if each.created_at)
    people = Counter(each.annotator for each in rankings)
    flags = Counter(flag for each in rankings for flag, value in each.flags.items() if value and flag != "marks")
    marks = Counter(mark for each in rankings for mark in each.flags.get("marks", ()))
    versions = sorted({each.guideline_version for each in rankings})
    lines = {
        "Rankings": len(rankings),
        "Items (a prompt with its completions) in the store": counts.items,
        "Completions in the store": counts.completions,
        "Given between": f"{said[0]} and {said[-1]}" if said else "unknown",
        "Guideline versions": ", ".join(map(str, versions)) or "none",
        "Completions written by": ", ".join(models) or "none",
        **{f"Rankings by {who}": number for who, number in sorted(people.items())},
        **{f"Flagged by annotators: {flag}": number for flag, number in sorted(flags.items())},
        **{f"Marked by the server: {mark}": number for mark, number in sorted(marks.items())},
        **agreement,
    }
    table = "\n".join(f"| {_cell(what)} | {_cell(value)} |" for what, value in lines.items())
    return CARD_TEXT.format(mark=MARK, name=name, contents=CONTENTS[kind], table=table, head=log)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


CARD_TEXT = """\
---
tags: [human-feedback, rlhf, preferences]
---
{mark}
# {name}

{contents}

## How it was collected

Annotators ranked the completions of a prompt on the page of `rlhf label`: blinded cards, in an order drawn for each
annotator and item and stored with the ranking; nothing is ranked before the annotator places it. Ties and setting
aside are allowed. Gold items and hidden repeats, by which annotators are checked, and rankings that came after their
place had gone to others are left out. Names of the kind `simulated-1` are programs. Imported rankings were given
elsewhere.

## Counts

| | |
| --- | --- |
{table}

The log ended with `{head}` when this was written: `rlhf data verify --head` with it shows whether the store still holds
the same past.
"""

"""What an admin may take away: rankings, preferences with weights, and the log, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from labeling_ui.admin import Admin
from labeling_ui.person import Person
from labeling_ui.raters import SoftLabel
from rlhf.data import write_rankings
from rlhf.label_exports import as_turns, read_events

RANKINGS, PREFERENCES, EVENTS = "rankings.jsonl", "preferences.jsonl", "events.jsonl"
DOWNLOADS = {
    RANKINGS: "Every ranking that stands, of all rounds; an adjudicated item yields the adjudication alone. What "
    "rlhf reward trains on.",
    PREFERENCES: "Every two completions of this round that somebody compared: prompt, chosen, rejected, the chance "
    "that an annotator finds chosen better, and a weight, by the rater model.",
    EVENTS: "The log: everything that happened, with the hashes by which it can be verified.",
}
"""Names of the files, and what is in them."""


def write(admin: Admin, person: Person, name: str, path: Path) -> None:
    """Write one of `DOWNLOADS`. Raises PermissionError for whoever is no admin."""
    admin.check(person)
    if name == RANKINGS:
        write_rankings(path, admin.store.rankings(resolved=True))
        return
    rows = _preferences(admin.labels(person)) if name == PREFERENCES else read_events(admin.store)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _preferences(labels: Sequence[SoftLabel]) -> Iterator[dict[str, Any]]:
    """TRL's preference format with two more columns; where one prompt is a conversation, all become conversations."""
    chat = any(isinstance(label.prompt, list) for label in labels)
    for label in labels:
        sides = {"prompt": ("user", label.prompt), "chosen": ("assistant", label.chosen)}
        sides["rejected"] = ("assistant", label.rejected)
        said = {name: as_turns(*side) if chat else side[1] for name, side in sides.items()}
        yield {**said, "probability": label.probability, "weight": label.weight}

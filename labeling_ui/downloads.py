"""What an admin may take away: rankings, preferences with weights, and the log, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from labeling_ui.admin import Admin
from labeling_ui.person import Person
from labeling_ui.raters import SoftLabel
from rlhf.data import write_rankings
from rlhf.schema import events, payloads
from rlhf.store import Store

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
    rows = (_preference(label) for label in admin.labels(person)) if name == PREFERENCES else _events(admin.store)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _preference(label: SoftLabel) -> dict[str, Any]:
    """TRL's preference format, standard or conversational as the prompt is, with two more columns."""
    chosen, rejected = (
        text if isinstance(label.prompt, str) else [{"role": "assistant", "content": text}]
        for text in (label.chosen, label.rejected)
    )
    said = {"prompt": label.prompt, "chosen": chosen, "rejected": rejected}
    return {**said, "probability": label.probability, "weight": label.weight}


def _events(store: Store) -> Iterator[dict[str, Any]]:
    query = (
        sa.select(events, payloads.c.annotator, payloads.c.salt, payloads.c.body)
        .outerjoin(payloads, payloads.c.event_id == events.c.id)
        .order_by(events.c.id)
    )
    with store.read() as connection:
        for row in connection.execution_options(yield_per=1000).execute(query):
            yield dict(row._mapping)

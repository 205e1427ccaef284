"""Making room in a label store for a stage that is done again. What a person was shown or said always stays."""

from __future__ import annotations

import sqlalchemy as sa

from rlhf.event_log import FORGET, add_event
from rlhf.schema import assignments, completions, drafts, gold, items, rankings
from rlhf.store import Store

SIMULATED = "simulated-"
"""How the names of simulated annotators begin."""


def forget(store: Store, *, round: int, samples: bool) -> None:
    """Remove what simulated annotators said in a round, and with `samples` every item that no person has been shown."""
    of_round = sa.select(items.c.id).where(items.c.round == round)
    begins = sa.func.substr(assignments.c.annotator, 1, len(SIMULATED))  # LIKE takes `Simulated-` for it on SQLite
    simulated = sa.and_(assignments.c.item_id.in_(of_round), begins == SIMULATED)
    with store.write() as connection:
        theirs = sa.select(assignments.c.id).where(simulated)
        said = sa.select(rankings.c.assignment_id).where(rankings.c.assignment_id.in_(theirs)).distinct()
        forgotten = sorted(connection.scalars(said))
        for table in (rankings, drafts):
            connection.execute(sa.delete(table).where(table.c.assignment_id.in_(theirs)))
        connection.execute(sa.delete(assignments).where(simulated))
        if samples:
            unseen = of_round.where(items.c.id.not_in(sa.select(assignments.c.item_id)))
            connection.execute(sa.delete(gold).where(gold.c.item_id.in_(unseen)))
            connection.execute(sa.delete(completions).where(completions.c.item_id.in_(unseen)))
            connection.execute(sa.delete(items).where(items.c.id.in_(unseen)))
        add_event(connection, FORGET, round=round, samples=samples, forgotten=forgotten)

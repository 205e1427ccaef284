"""The label store: what was sampled, who was shown what, and every ranking. SQLAlchemy Core, SQLite by default.

A write that returned is on disk. Nothing that a person said is ever overwritten: a corrected ranking supersedes the
old row, and every step is an event in an append-only log. All statements are portable to PostgreSQL but for one
connect hook.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from rlhf import database
from rlhf.contract import digest
from rlhf.data import prompt_key, ranking_to_json, write_rankings
from rlhf.database import begin, connect, refusing, shown
from rlhf.event_log import ITEM, add_event, now
from rlhf.judgements import (
    LATE,
    TASK,
    Judgement,
    add_ranking,
    completions_of,
    insert,
    item_key,
    judgement_of,
    standing,
    withdraw,
)
from rlhf.migrations import prepare
from rlhf.schema import assignments, completions, items, meta, rankings
from rlhf.turns import Turns
from rlhf.types import Completion, DataError, Prompt, Ranking, StoreError

__all__ = ["Counts", "Item", "Judgement", "Store", "add_event", "add_ranking", "insert", "now", "withdraw"]


@dataclass(frozen=True)
class Item:
    """A prompt with its K completions, in the order in which they were stored."""

    id: int
    prompt: Prompt
    completions: tuple[Completion, ...]
    round: int


@dataclass(frozen=True)
class Counts:
    """How much a store holds."""

    items: int
    completions: int
    rankings: int
    annotators: dict[str, int]
    """Rankings by annotator."""


class Store:
    """One label store. Raises DataError where it cannot be opened or written; safe to use from several threads."""

    def __init__(self, url: str | Path, *, create: bool = True, backed_up: bool = False) -> None:
        """`url` is an SQLite file or an SQLAlchemy URL; with `create=False` a missing file is an error.

        A store of an older version of rlhf is brought to the present schema, see `rlhf.migrations.prepare`.
        """
        self.name = str(url)
        self.engine = connect(self.name, create=create)
        self._writer = Turns()  # waiting here is fair and quick; the database's own lock serves other processes
        try:
            with refusing(self.name, "opened"), begin(self.engine, write=True) as connection:
                prepare(connection, self.name, backed_up=backed_up)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the connections; the store cannot be used afterwards."""
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction, alone with the store: all or nothing, and on disk when the block ends."""
        with self._turn(), refusing(self.name, "written"), begin(self.engine, write=True) as connection:
            # SQLite has locked the file already; on a server this row is the lock.
            connection.execute(sa.select(meta.c.value).where(meta.c.name == "schema_version").with_for_update())
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view of the store; writers are not held up."""
        with refusing(self.name, "read"), begin(self.engine, write=False) as connection:
            yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._writer.acquire(timeout=database.BUSY_SECONDS):
            raise StoreError(f"the label store {shown(self.name)} is busy: nothing was saved; try again in a moment")
        try:
            yield
        finally:
            self._writer.release()

    # ------------------------------------------------------------------------------------------ what was sampled

    def add_completions(self, prompt: Prompt, completions: Sequence[Completion], round: int = 0) -> int:
        """Store an item and return its id; the same prompt, texts and round a second time change nothing."""
        with self.write() as connection:
            return add_item(connection, prompt, completions, round)

    def items(self, round: int | None = None) -> list[Item]:
        """All items (of one round), in the order in which they were stored."""
        wanted = sa.true() if round is None else items.c.round == round
        with self.read() as connection:
            texts = completions_of(connection, wanted)
            rows = connection.execute(sa.select(items).where(wanted).order_by(items.c.id)).all()
        return [Item(row.id, row.prompt, tuple(texts[row.id]), row.round) for row in rows]

    def counts(self) -> Counts:
        """Sizes of the tables; superseded and undone rankings, gold items and repeats do not count."""
        by_annotator = (
            sa.select(assignments.c.annotator, sa.func.count())
            .join(rankings, rankings.c.assignment_id == assignments.c.id)
            .where(rankings.c.active, assignments.c.kind == TASK, assignments.c.state != LATE)
            .group_by(assignments.c.annotator)
            .order_by(assignments.c.annotator)
        )
        with self.read() as connection:
            annotators = {row[0]: row[1] for row in connection.execute(by_annotator)}
            return Counts(
                items=connection.scalars(sa.select(sa.func.count()).select_from(items)).one(),
                completions=connection.scalars(sa.select(sa.func.count()).select_from(completions)).one(),
                rankings=sum(annotators.values()),
                annotators=annotators,
            )

    # -------------------------------------------------------------------------------------------- what was said

    def rankings(
        self,
        annotators: Sequence[str] | None = None,
        rounds: Sequence[int] | None = None,
        kinds: Sequence[str] = (TASK,),
        resolved: bool = False,
        late: bool = False,
    ) -> list[Ranking]:
        """The rankings that stand, ordered by round, item and annotator however they came in.

        Gold items and repeats are other `kinds`, left out by default. With `resolved`, an item that was adjudicated
        (by one of `annotators`, where they are given) yields that ranking alone. Those that came `late`, after enough
        others had ranked the item, are surplus: left out by default, they would count one item more often than wanted.
        """
        with self.read() as connection:
            found = standing(
                connection, annotators=annotators, rounds=rounds, kinds=kinds, resolved=resolved, late=late
            )
        return list(found.values())

    def import_rankings(self, incoming: Sequence[Ranking]) -> int:
        """Take rankings from elsewhere and return how many were new; the same file a second time changes nothing.

        Another ranking by the same annotator of the same completions supersedes the one that stood. One that they have
        since replaced or taken back is nothing new: an old export does not undo what came after it.
        """
        with self.write() as connection:
            return sum(_import(connection, ranking) for ranking in incoming)

    def export(self, path: str | Path) -> int:
        """Write the rankings that stand as JSON lines, all or nothing; returns how many."""
        found = self.rankings(resolved=True)
        write_rankings(path, found)
        return len(found)

    def content_hash(self) -> str:
        """Fingerprint of what the rankings say: not of the file, nor of when and how fast they were given."""
        lines = (
            json.dumps(ranking_to_json(replace(ranking, created_at=None, seconds=None)), sort_keys=True)
            for ranking in self.rankings(resolved=True)
        )
        return digest("\n".join(lines))


# ------------------------------------------------------------------------------------- steps inside a transaction


def add_item(connection: sa.Connection, prompt: Prompt, texts: Sequence[Completion], round: int) -> int:
    """`Store.add_completions` inside a transaction."""
    if len(texts) < 2:
        raise DataError(f"an item needs at least 2 completions to rank, this one has {len(texts)}")
    key = item_key(prompt, [each.text for each in texts], round)
    known = connection.scalars(sa.select(items.c.id).where(items.c.key == key)).one_or_none()
    if known is not None:
        return known
    row = {"key": key, "prompt_key": prompt_key(prompt), "prompt": prompt, "round": round}
    item_id = insert(connection, items, row)
    rows = [{**asdict(each), "item_id": item_id, "position": position} for position, each in enumerate(texts)]
    connection.execute(sa.insert(completions), rows)
    add_event(connection, ITEM, item_id=item_id, key=key, completions=len(texts))
    return item_id


def _import(connection: sa.Connection, ranking: Ranking) -> bool:
    key = "import:" + digest(json.dumps(ranking_to_json(ranking), sort_keys=True, ensure_ascii=False))
    texts = [Completion(text, model="imported", seed=0) for text in ranking.completions]
    item_id = add_item(connection, ranking.prompt, texts, ranking.round)
    mine = sa.and_(
        assignments.c.item_id == item_id,
        assignments.c.annotator == ranking.annotator,
        assignments.c.kind == TASK,
    )
    assignment_id = connection.scalars(sa.select(assignments.c.id).where(mine)).one_or_none()
    marks = ranking.flags.get("marks", [])
    flags = {name: value for name, value in ranking.flags.items() if name != "marks"}
    judgement = judgement_of(replace(ranking, flags=flags))
    said = connection.execute(sa.select(rankings).where(rankings.c.assignment_id == assignment_id)).all()
    if any(row.idempotency_key == key or judgement_of(row) == judgement for row in said):
        return False
    event = add_event(connection, "import", ranking.annotator, item_id)
    order = ranking.presented_order or tuple(range(len(texts)))
    state = LATE if LATE in marks else "done"
    place = {"state": state, "leased_until": 0.0, "event": event}
    if assignment_id is None:
        row = {"item_id": item_id, "annotator": ranking.annotator, "presented_order": order, **place}
        assignment_id = insert(connection, assignments, row)
    else:  # its order stays: a page may be showing it
        connection.execute(sa.update(assignments).where(assignments.c.id == assignment_id).values(place))
    add_ranking(connection, assignment_id, key, judgement, marks)
    return True

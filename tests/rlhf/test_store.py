"""The label store: nothing lost, nothing twice, and the same content whatever the way in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from rlhf import renewal, schema
from rlhf.data import read_rankings
from rlhf.judgements import judgement_of
from rlhf.store import Judgement, Store, add_event, add_ranking, insert, withdraw
from rlhf.types import Completion, DataError, Ranking

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "Hi \u2028 ü"}]
TEXTS = [
    Completion("good", "sft", 1, {"temperature": 1.0, "max_completion_tokens": 8}),
    Completion("", "sft", 2, {}, finished=False),
    Completion("bad", "ppo", 2**40),
]
A = Ranking(CHAT, ("good", "", "bad"), (1, 2, 2), "ann", (2, 0, 1), {"unsafe": True}, "why", 3.5, 0, 2, "2026-01-01")
B = Ranking("p", ("x", "y"), (None, 1), "bob", created_at="2026-01-02", round=1)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        yield store


def test_items_come_back_as_they_went_in(store: Store) -> None:
    first = store.add_completions(CHAT, TEXTS)
    second = store.add_completions("p", TEXTS[:2], round=1)
    assert [item.id for item in store.items()] == [first, second]
    assert store.items(0)[0].prompt == CHAT
    assert store.items(0)[0].completions == tuple(TEXTS)
    assert [item.round for item in store.items(1)] == [1]


def test_the_same_item_twice_is_one(store: Store) -> None:
    first = store.add_completions("p", TEXTS)
    assert store.add_completions("p", TEXTS) == first
    assert store.add_completions("p", TEXTS, round=1) != first
    assert store.add_completions("p", TEXTS[::-1]) != first
    assert store.counts().items == 3
    assert store.counts().completions == 9


def test_one_completion_cannot_be_ranked(store: Store) -> None:
    with pytest.raises(DataError, match="at least 2 completions"):
        store.add_completions("p", TEXTS[:1])


def test_import_is_idempotent_and_export_is_its_inverse(store: Store, tmp_path: Path) -> None:
    assert store.import_rankings([A, B]) == 2
    assert store.import_rankings([B, A, A]) == 0
    assert store.rankings() == [A, B]
    assert store.counts().annotators == {"ann": 1, "bob": 1}
    assert store.export(tmp_path / "r.jsonl") == 2
    other = Store(tmp_path / "other.db")
    assert other.import_rankings(read_rankings(tmp_path / "r.jsonl").rankings) == 2
    assert other.rankings() == [A, B]
    assert other.import_rankings(store.rankings()) == 0


def test_rankings_of_sampled_items_join_them(store: Store) -> None:
    store.add_completions(CHAT, TEXTS)
    store.import_rankings([A])
    assert store.counts().items == 1
    assert store.items()[0].completions[0].model == "sft"


def test_a_changed_mind_supersedes_and_keeps_the_old_row(store: Store) -> None:
    changed = replace(A, ranks=(3, 2, 1))
    assert store.import_rankings([A, changed]) == 2
    assert store.rankings() == [changed]
    with store.read() as connection:
        rows = connection.execute(sa.select(schema.rankings).order_by(schema.rankings.c.version)).all()
    assert [(row.version, row.active, row.ranks) for row in rows] == [(1, False, [1, 2, 2]), (2, True, [3, 2, 1])]
    assert store.import_rankings([A]) == 0, "an old export does not bring an old mind back"


OPEN = {
    **{"item_id": 1, "annotator": A.annotator, "event": 1},
    **{"presented_order": [2, 0, 1], "state": "open", "leased_until": 9.0},
}
"""An assignment as the page makes it."""


def test_what_was_replaced_or_taken_back_on_the_page_does_not_come_back_with_an_old_export(store: Store) -> None:
    store.add_completions(A.prompt, [Completion(text, "m", 0) for text in A.completions])
    with store.write() as connection:
        assignment = insert(connection, schema.assignments, OPEN)
        add_ranking(connection, assignment, "first", judgement_of(A))
    (exported,) = store.rankings()
    with store.write() as connection:
        add_ranking(connection, assignment, "second", Judgement((3, 2, 1)))
    assert store.import_rankings([exported]) == 0
    assert [each.ranks for each in store.rankings()] == [(3, 2, 1)]
    with store.write() as connection:
        withdraw(connection, assignment)
    assert store.import_rankings([exported]) == 0
    assert store.rankings() == []


def test_an_import_leaves_the_order_in_which_a_page_shows_an_item(store: Store) -> None:
    """A submit names places on the page; with another order behind them it would rank other completions."""
    store.add_completions(A.prompt, [Completion(text, "m", 0) for text in A.completions])
    with store.write() as connection:
        insert(connection, schema.assignments, OPEN)
    assert store.import_rankings([replace(A, presented_order=None)]) == 1
    with store.read() as connection:
        assert connection.scalar(sa.select(schema.assignments.c.presented_order)) == [2, 0, 1]
    assert [each.presented_order for each in store.rankings()] == [None]


def test_a_person_whose_name_sounds_simulated_is_a_person(store: Store) -> None:
    """SQLite's LIKE takes capitals for small letters; PostgreSQL's does not."""
    store.import_rankings([replace(A, annotator=name) for name in ("simulated-1", "Simulated-Bob")])
    renewal.forget(store, round=0, samples=False)
    assert [each.annotator for each in store.rankings()] == ["Simulated-Bob"]


def test_selection_by_annotator_and_round(store: Store) -> None:
    store.import_rankings([A, B, replace(A, annotator="bob")])
    assert {r.annotator for r in store.rankings(annotators=["ann"])} == {"ann"}
    assert store.rankings(rounds=[1]) == [B]
    assert store.rankings(annotators=["ann"], rounds=[1]) == []
    assert store.rankings(annotators=[]) == []


def test_order_and_hash_do_not_depend_on_the_way_in(tmp_path: Path) -> None:
    many = [replace(B, prompt=f"p{n}", annotator=who) for n in range(20) for who in ("x", "y")]
    one, other = Store(tmp_path / "1.db"), Store(tmp_path / "2.db")
    one.import_rankings(many)
    other.import_rankings([replace(each, seconds=1.0, created_at="2027") for each in many[::-1]])
    assert [r.prompt for r in one.rankings()] == [r.prompt for r in other.rankings()]
    assert one.content_hash() == other.content_hash()
    other.import_rankings([replace(many[0], ranks=(1, 1))])
    assert one.content_hash() != other.content_hash()


def test_unranked_items_do_not_change_the_hash(store: Store) -> None:
    store.import_rankings([A])
    before = store.content_hash()
    store.add_completions("new", TEXTS)
    assert store.content_hash() == before


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    wrong = Ranking("q", ("x", "y"), (1, 2), "me", flags={"a": object()})
    with pytest.raises((TypeError, sa.exc.StatementError)):
        store.import_rankings([A, wrong])
    assert store.counts().items == 0
    assert store.counts().rankings == 0


def test_the_database_itself_refuses_two_standing_rankings(store: Store) -> None:
    store.import_rankings([A])
    row = {"assignment_id": 1, "idempotency_key": "k", "version": 2, "active": True, "ranks": [1, 2, 3]}
    second = sa.insert(schema.rankings).values(
        row | {"flags": {}, "guideline_version": 1, "created_at": "2026", "event": 1}
    )
    with store.write() as connection, pytest.raises(sa.exc.IntegrityError, match="assignment_id"):
        connection.execute(second)


def test_the_log_only_grows(store: Store) -> None:
    with store.write() as connection:
        numbers = [add_event(connection, "note", "me", number=n) for n in range(3)]
    assert numbers == [1, 2, 3]
    with store.read() as connection:
        bodies = connection.scalars(sa.select(schema.payloads.c.body).order_by(schema.payloads.c.event_id)).all()
    assert bodies == [f'{{"number":{n}}}' for n in range(3)]


def test_writers_wait_for_each_other(store: Store) -> None:
    def add(thread: int) -> None:
        for number in range(12):
            store.add_completions(f"{thread} {number}", TEXTS)
            store.add_completions(f"shared {number}", TEXTS)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts().items == 6 * 12 + 12


def test_a_write_that_returned_survives_a_kill(store_url: str) -> None:
    code = (
        "import sys; from rlhf.store import Store; from rlhf.types import Ranking\n"
        "store = Store(sys.argv[1])\n"
        "for n in range(10**6):\n"
        "    store.import_rankings([Ranking(f'p{n}', ('x', 'y'), (1, 2), 'me')]); print(n, flush=True)\n"
    )
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, store_url], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(20)]
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.read().splitlines()
        process.wait()
        saved = {ranking.prompt for ranking in Store(store_url, create=False).rankings()}
        assert {f"p{int(line)}" for line in acknowledged if line.strip().isdecimal()} <= saved


def test_judgements_keep_their_versions(store: Store) -> None:
    store.import_rankings([A])
    with store.write() as connection:
        add_ranking(connection, 1, "again", Judgement((2, 1, 1)))
    assert store.rankings()[0].ranks == (2, 1, 1)

"""A backup is what the store was at one moment, and comes back as that, or not at all."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from rlhf import schema
from rlhf.backup import backup, restore
from rlhf.store import Store, add_event, insert
from rlhf.types import Completion, DataError, Ranking
from rlhf.verification import verify

A = Ranking("p", ("x", "y", "z"), (1, 2, None), "ann", (2, 0, 1), {"unclear": True}, "wh\u00fc", 3.25)
TEXTS = [Completion("a", "m", 2**40, {"t": [0.1, None]}), Completion("", "m", 1, finished=False)]


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        fill(store)
        yield store


def fill(store: Store) -> None:
    """At least one row in every table that refers to another."""
    store.import_rankings([A])
    item = store.add_completions([{"role": "user", "content": "q"}], TEXTS, round=1)
    with store.write() as connection:
        connection.execute(sa.insert(schema.gold).values(item_id=item, ranks=[1, None]))
        user = {"name": "ann", "role": "admin", "created_at": "2026"}
        row = {"token_hash": "t", "user_id": insert(connection, schema.users, user), "csrf": "c"}
        connection.execute(sa.insert(schema.sessions).values(**row, created_at=1.5, seen_at=2.5))
        connection.execute(sa.insert(schema.drafts).values(assignment_id=1, body={"a": [1]}, saved_at="2026"))


def content(store: Store) -> dict[str, list[tuple]]:
    with store.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for table in schema.tables.sorted_tables
        }


def test_a_backup_holds_everything_and_is_a_store_itself(store: Store, tmp_path: Path) -> None:
    verdict = backup(store, tmp_path / "sub" / "b.db")
    assert verdict.holds
    assert [each.name for each in (tmp_path / "sub").iterdir()] == ["b.db"], "one file"
    with closing(Store(tmp_path / "sub" / "b.db", create=False)) as copy:
        assert content(copy) == content(store)


def test_restored_is_what_was_backed_up(store: Store, store_url: str, tmp_path: Path) -> None:
    before = content(store)
    backup(store, tmp_path / "b.db")
    store.import_rankings([Ranking("later", ("x", "y"), (1, 2), "bob")])
    lost = content(store)
    store.close()
    with pytest.raises(DataError, match="--force moves"):
        restore(tmp_path / "b.db", store_url)
    with closing(Store(store_url)) as untouched:
        assert content(untouched) == lost
    verdict, kept = restore(tmp_path / "b.db", store_url, force=True)
    assert verdict.holds
    assert kept is not None
    with closing(Store(store_url)) as restored:
        assert content(restored) == before
        restored.import_rankings([Ranking("new", ("x", "y"), (1, 2), "bob")])
        with restored.read() as connection:
            assert verify(connection, verdict.head).holds, "work goes on from there"
            if "://" in store_url:
                moved = connection.exec_driver_sql(f'SELECT count(*) FROM {kept.split()[1]}."rankings"').scalar()
                assert moved == len(lost["rankings"])
    if "://" not in store_url:
        with closing(Store(kept, create=False)) as old:
            assert content(old) == lost


def test_a_store_moves_from_one_database_to_the_other(tmp_path: Path, postgres_url: str) -> None:
    with closing(Store(tmp_path / "labels.db")) as first:
        fill(first)
        backup(first, tmp_path / "b.db")
        assert restore(tmp_path / "b.db", postgres_url)[1] is None
        with closing(Store(postgres_url)) as second:
            assert content(second) == content(first)
            second.add_completions("new", TEXTS)
            backup(second, tmp_path / "c.db")
            assert restore(tmp_path / "c.db", str(tmp_path / "back.db"))[0].holds
            with closing(Store(tmp_path / "back.db")) as third:
                assert content(third) == content(second)


def test_writers_go_on_meanwhile_and_every_backup_is_whole(store: Store, tmp_path: Path) -> None:
    over, failures = threading.Event(), []

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                store.import_rankings([Ranking(f"{threading.get_ident()} {number}", ("x", "y"), (1, 2), "bob")])
            except DataError as error:
                failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        verdicts = [backup(store, tmp_path / f"{n}.db") for n in range(4)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert sorted(each.events for each in verdicts) == [each.events for each in verdicts]
    with store.read() as connection:
        assert verify(connection, verdicts[-1].head).holds


def test_nothing_is_overwritten(store: Store, tmp_path: Path) -> None:
    (tmp_path / "b.db").write_text("precious")
    with pytest.raises(DataError, match=r"b\.db exists already: name a new file"):
        backup(store, tmp_path / "b.db")
    assert (tmp_path / "b.db").read_text() == "precious"


def test_a_backup_that_was_changed_is_refused_before_anything_is_touched(store: Store, tmp_path: Path) -> None:
    backup(store, tmp_path / "b.db")
    before = content(store)
    with closing(sqlite3.connect(tmp_path / "b.db")) as connection:
        connection.execute("UPDATE rankings SET ranks = '[3, 2, 1]'")
        connection.commit()
    with pytest.raises(DataError, match=r"b\.db does not verify: ranking 1 is not as event"):
        restore(tmp_path / "b.db", store.name, force=True)
    assert content(store) == before


def test_what_is_no_backup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no backup at"):
        restore(tmp_path / "none.db", str(tmp_path / "a.db"))
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(DataError, match="not a database"):
        restore(tmp_path / "text.db", str(tmp_path / "a.db"))
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(DataError, match="is no label store"):
        restore(tmp_path / "empty.db", str(tmp_path / "a.db"))
    assert not (tmp_path / "a.db").exists()


def test_a_store_that_is_open_is_not_moved_away(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "labels.db")) as store:
        fill(store)
        backup(store, tmp_path / "b.db")
        with store.read(), pytest.raises(DataError, match=r"is open in another process .*end `rlhf label` first"):
            restore(tmp_path / "b.db", str(tmp_path / "labels.db"), force=True)
        assert store.counts().rankings == 1
    assert not list(tmp_path.glob("*replaced*"))
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with closing(Store(tmp_path / "labels.db")) as store:
        add_something(store)
        monkeypatch.setattr("rlhf.backup._copy_file", fail)
        with pytest.raises(DataError, match=r"disk is full.*nothing is left there; make room"):
            backup(store, tmp_path / "sub" / "b.db")
    assert list((tmp_path / "sub").iterdir()) == []


def add_something(store: Store) -> None:
    with store.write() as connection:
        add_event(connection, "note")

"""The databases behind a label store: durable, and clear about what goes wrong."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from rlhf import database
from rlhf.store import Store, add_event
from rlhf.types import Completion, ConfigError, DataError, Ranking, StoreError
from rlhf.verification import verify

A = Ranking("p", ("x", "y"), (1, 2), "ann", created_at="2026-01-01")
TEXTS = [Completion("a", "m", 0), Completion("b", "m", 1)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "sub" / "labels.db")


def test_sqlite_is_set_up_for_durability(store: Store) -> None:
    with store.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 15000}


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database, " * 100)
    with pytest.raises(DataError, match=r"text\.db cannot be opened \(file is not a database\): choose another"):
        Store(tmp_path / "text.db")
    with pytest.raises(DataError, match="is a folder"):
        Store(tmp_path)
    with pytest.raises(DataError, match="there is no label store"):
        Store(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(ConfigError, match="cannot be used"):
        Store("nosuch://host/db")


def test_a_store_of_another_version_is_refused(store: Store) -> None:
    with sqlite3.connect(store.name) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema_version'")
    with pytest.raises(DataError, match="has schema 99, this version of rlhf knows 2"):
        Store(store.name)


def test_a_url_is_a_store_too(tmp_path: Path) -> None:
    Store(f"sqlite:///{tmp_path / 'a.db'}").import_rankings([A])
    assert Store(tmp_path / "a.db", create=False).rankings() == [A]


@pytest.mark.parametrize(
    ("name", "pragma", "sign"),
    [
        (":memory:", "journal_mode=WAL", "without a write-ahead log for SQLite (journal_mode is 'memory')"),
        ("labels.db", "journal_mode=DELETE", "journal_mode is 'delete'"),
        ("labels.db", "synchronous=NORMAL", "synchronous is 1, not 2"),
    ],
)
def test_a_connection_that_is_not_durable_is_refused(tmp_path: Path, name: str, pragma: str, sign: str) -> None:
    with closing(sqlite3.connect(name if name == ":memory:" else tmp_path / name)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA {pragma}")
        with pytest.raises(DataError, match=re.escape(sign)):
            database.check_durable(connection, "labels.db")


def test_every_connection_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(connection: sqlite3.Connection, name: str) -> None:
        seen.append(connection)
        if len(seen) == 3:
            raise DataError(f"{name} is not durable")

    seen: list[sqlite3.Connection] = []
    monkeypatch.setattr(database, "check_durable", refuse)
    store = Store(tmp_path / "labels.db")
    with store.read(), store.read(), pytest.raises(DataError, match="is not durable"), store.read():
        pass
    assert len(set(map(id, seen))) == 3


def test_a_store_in_memory_is_refused() -> None:
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ConfigError, match="would be lost"):
            Store(url)


def test_a_store_that_another_process_holds_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    waiting = Store(store.name)
    with closing(sqlite3.connect(store.name, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with pytest.raises(DataError, match=r"database is locked\): nothing was saved; another process holds it"):
            waiting.add_completions("p", TEXTS)
        assert time.monotonic() - start > 0.25
        assert waiting.items() == [], "reading goes on"
        other.execute("ROLLBACK")
    assert waiting.add_completions("p", TEXTS) == 1


def test_a_row_that_another_process_holds_says_so(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    with closing(Store(postgres_url)) as holding, closing(Store(postgres_url)) as waiting:
        with (
            holding.write(),
            pytest.raises(DataError, match=r"lock timeout.*: nothing was saved; another process holds it"),
        ):
            waiting.add_completions("p", TEXTS)
        assert waiting.add_completions("p", TEXTS) == 1


def test_writers_of_one_process_take_turns(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Store(store_url)) as store:
        monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
        with store.write(), pytest.raises(StoreError, match="is busy: nothing was saved"):
            store.add_completions("p", TEXTS)
        assert store.add_completions("p", TEXTS) == 1


def test_a_full_disk_says_so_and_saves_nothing(store: Store) -> None:
    store.import_rankings([A])

    def fill(connection: sa.Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    sa.event.listen(store.engine, "begin", fill)
    with pytest.raises(DataError, match=r"full\): nothing was saved; make room on that disk and repeat"):
        store.add_completions("p" * 100_000, TEXTS)
    sa.event.remove(store.engine, "begin", fill)
    with store.write() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1000000")
    assert store.rankings() == [A]
    assert store.counts().items == 1
    store.add_completions("p" * 100_000, TEXTS)
    assert store.counts().items == 2


def test_fifty_at_once_are_served(store_url: str) -> None:
    """More threads than connections: each write waits for its turn, none for longer than it may."""
    failures: list[BaseException] = []
    together = threading.Barrier(50)

    def work(number: int) -> None:
        try:
            together.wait()
            for turn in range(3):
                with store.write() as connection:
                    add_event(connection, "note", f"a{number}", turn=turn)
                store.counts()
        except BaseException as error:
            failures.append(error)

    with closing(Store(store_url)) as store:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with store.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*), max(id) FROM events").one() == (150, 150)
    assert failures == []


def test_a_lost_connection_says_so_and_the_next_one_works(postgres_url: str) -> None:
    with closing(Store(postgres_url)) as store:
        with pytest.raises(DataError, match="the connection was lost"):
            _lose_the_connection(store, postgres_url)
        _end_sessions(postgres_url)  # of connections that wait in the pool
        assert store.add_completions("p", TEXTS) == 1
        with store.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM events").scalar() == 1, "all or nothing"


def _lose_the_connection(store: Store, url: str) -> None:
    with store.write() as connection:
        add_event(connection, "note")
        _end_sessions(url)
        add_event(connection, "note")


def _end_sessions(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    engine.dispose()


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    with pytest.raises(DataError, match=r"refused.*: look at the server and at --store") as found:
        Store("postgresql://me:topsecret@127.0.0.1:1/labels")
    assert "topsecret" not in str(found.value)


def test_commits_wait_for_the_disk(postgres_url: str) -> None:
    with closing(Store(postgres_url)) as store, store.read() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"


def test_a_reader_sees_one_state(store_url: str) -> None:
    with closing(Store(store_url)) as store:
        with store.read() as connection:
            before = connection.exec_driver_sql("SELECT count(*) FROM items").scalar()
            store.add_completions("p", TEXTS)
            assert connection.exec_driver_sql("SELECT count(*) FROM items").scalar() == before == 0
        assert store.counts().items == 1


def test_two_processes_write_one_chain(store_url: str) -> None:
    """Two stores stand for two processes: each has a lock and connections of its own."""
    with closing(Store(store_url)) as one, closing(Store(store_url)) as other:

        def work(store: Store, number: int) -> None:
            for turn in range(10):
                store.import_rankings([replace(A, annotator=f"{number} {turn}")])

        threads = [threading.Thread(target=work, args=(each, n)) for n in range(3) for each in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with one.read() as connection:
            verdict = verify(connection)
    assert (verdict.faults, verdict.rankings) == ((), 30), "of the same names by both, one each"


def test_a_new_store_opened_together_is_made_once(store_url: str) -> None:
    failures: list[BaseException] = []
    together = threading.Barrier(8)

    def work() -> None:
        together.wait()
        try:
            with closing(Store(store_url)) as store:
                store.add_completions("p", TEXTS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with closing(Store(store_url)) as store:
        assert store.counts().items == 1

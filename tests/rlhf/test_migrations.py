"""Stores of version 1 are brought forward with everything in them, and a copy is kept."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from rlhf.migrations import copy_aside
from rlhf.schema import assignments, events, payloads, rankings
from rlhf.store import Store
from rlhf.types import Completion, DataError, Ranking
from rlhf.verification import verify

OLD = """
CREATE TABLE events (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	at TEXT NOT NULL,
	kind TEXT NOT NULL,
	annotator TEXT,
	item_id INTEGER,
	payload JSON NOT NULL
);
CREATE TABLE items (
	id INTEGER NOT NULL,
	"key" TEXT NOT NULL,
	prompt_key TEXT NOT NULL,
	prompt JSON NOT NULL,
	round INTEGER NOT NULL,
	PRIMARY KEY (id),
	UNIQUE ("key")
);
CREATE INDEX ix_items_prompt_key ON items (prompt_key);
CREATE INDEX ix_items_round ON items (round);
CREATE TABLE meta (
	name TEXT NOT NULL,
	value TEXT NOT NULL,
	PRIMARY KEY (name)
);
CREATE TABLE assignments (
	id INTEGER NOT NULL,
	item_id INTEGER NOT NULL,
	annotator TEXT NOT NULL,
	presented_order JSON NOT NULL,
	state TEXT NOT NULL,
	leased_until FLOAT NOT NULL,
	event INTEGER NOT NULL,
	PRIMARY KEY (id),
	UNIQUE (item_id, annotator),
	FOREIGN KEY(item_id) REFERENCES items (id)
);
CREATE INDEX assignments_by_annotator ON assignments (annotator, state);
CREATE TABLE completions (
	item_id INTEGER NOT NULL,
	position INTEGER NOT NULL,
	text TEXT NOT NULL,
	model TEXT NOT NULL,
	seed BIGINT NOT NULL,
	settings JSON NOT NULL,
	finished BOOLEAN NOT NULL,
	PRIMARY KEY (item_id, position),
	FOREIGN KEY(item_id) REFERENCES items (id)
);
CREATE TABLE rankings (
	id INTEGER NOT NULL,
	assignment_id INTEGER NOT NULL,
	idempotency_key TEXT NOT NULL,
	version INTEGER NOT NULL,
	active BOOLEAN NOT NULL,
	ranks JSON NOT NULL,
	presented_order JSON,
	flags JSON NOT NULL,
	rationale TEXT,
	seconds FLOAT,
	guideline_version INTEGER NOT NULL,
	created_at TEXT NOT NULL,
	PRIMARY KEY (id),
	UNIQUE (assignment_id, version),
	FOREIGN KEY(assignment_id) REFERENCES assignments (id),
	UNIQUE (idempotency_key)
);
CREATE UNIQUE INDEX one_active_ranking ON rankings (assignment_id) WHERE active;
"""
"""The tables as version 1 of the schema made them."""

KEY_1, KEY_2 = "86225e1239694e91", "ac042fd945b34c84"  # of these two items, as version 1 worked them out
ROWS = {
    "meta": [("schema_version", "1")],
    "items": [(1, KEY_1, "k", '"p"', 0), (2, KEY_2, "k", '[{"role": "user", "content": "q"}]', 1)],
    "completions": [
        (item, place, text, "sft", 2**40, '{"temperature": 1.0}', True)
        for item in (1, 2)
        for place, text in enumerate(("x", "y", "z")[: 4 - item])
    ],
    "events": [
        (1, "2026-01-01", "item", None, 1, '{"completions": 3}'),
        (2, "2026-01-01", "item", None, 2, '{"completions": 2}'),
        (3, "2026-01-02", "assigned", "ann", 1, '{"presented_order": [2, 0, 1]}'),
        (4, "2026-01-03", "done", "ann", 1, '{"assignment": 1, "ranking": 1}'),
        (6, "2026-01-04", "assigned", "bob", 2, '{"presented_order": [0, 1]}'),
        (9, "2026-01-05", "open", "bob", 2, '{"assignment": 5, "undone": "done"}'),
    ],
    "assignments": [
        (1, 1, "ann", "[2, 0, 1]", "done", 0.0, 4),
        (5, 2, "bob", "[0, 1]", "open", 1e9, 9),
    ],
    "rankings": [
        (1, 1, "a", 1, False, "[1, 2, 3]", "[2, 0, 1]", "{}", None, None, 1, "2026-01-03"),
        (2, 1, "b", 2, True, "[1, 1, null]", "[2, 0, 1]", '{"unclear": true}', "why", 2.5, 3, "2026-01-03"),
        (3, 5, "c", 1, False, "[2, 1]", None, "{}", None, 1.0, 1, "2026-01-04"),
    ],
}
EXPECTED = Ranking(
    "p", ("x", "y", "z"), (1, 1, None), "ann", (2, 0, 1), {"unclear": True}, "why", 2.5, 0, 3, "2026-01-03"
)


@pytest.fixture
def old_store(store_url: str) -> str:
    """A store as version 1 left it."""
    engine = sa.create_engine(store_url if "://" in store_url else f"sqlite:///{store_url}")
    with engine.begin() as connection:
        sqlite = connection.dialect.name == "sqlite"
        for statement in OLD.split(";")[:-1]:
            if not sqlite:
                statement = statement.replace("id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "id SERIAL PRIMARY KEY")
                statement = statement.replace("\tid INTEGER NOT NULL", "\tid SERIAL")
            connection.exec_driver_sql(statement)
        for table, rows in ROWS.items():
            mark = ", ".join(["?" if sqlite else "%s"] * len(rows[0]))
            for row in rows:
                connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({mark})", row)
    engine.dispose()
    return store_url


def test_everything_is_brought_along(old_store: str) -> None:
    with closing(Store(old_store, create=False, backed_up=True)) as store:
        assert store.rankings() == [EXPECTED]
        assert store.counts().annotators == {"ann": 1}
        assert [len(item.completions) for item in store.items()] == [3, 2]
        with store.read() as connection:
            verdict = verify(connection)
            rows = connection.execute(sa.select(rankings).order_by(rankings.c.id)).all()
            held = connection.execute(sa.select(assignments).order_by(assignments.c.id)).all()
            log = connection.execute(sa.select(events, payloads).join(payloads).order_by(events.c.id)).all()
    assert verdict.faults == ()
    assert [(row.id, row.version, row.active, row.marks) for row in rows] == [
        (1, 1, False, []),
        (2, 2, True, []),
        (3, 1, False, []),
    ]
    assert [(row.id, row.kind, row.state, row.event) for row in held] == [
        (1, "task", "done", 4),
        (5, "task", "open", 6),
    ]
    kinds = ["item", "item", "assigned", "done", "assigned", "open", "ranking", "ranking", "ranking", "withdrawn"]
    assert [row.kind for row in log] == [*kinds, "migrated"]
    assert [(row.at, row.annotator, row.item_id, json.loads(row.body)) for row in log[:6]] == [
        (at, who, item, json.loads(body)) for _, at, _, who, item, body in ROWS["events"]
    ]


def test_work_goes_on_afterwards(old_store: str) -> None:
    with closing(Store(old_store, backed_up=True)) as store:
        assert store.add_completions("new", [Completion("a", "m", 0), Completion("b", "m", 1)]) == 3
        assert store.import_rankings([EXPECTED]) == 0
        assert store.import_rankings([Ranking("new", ("a", "b"), (1, 2), "bob")]) == 1
        with store.read() as connection:
            assert verify(connection).holds
    with closing(Store(old_store)) as again:
        assert len(again.rankings()) == 2


def test_a_copy_of_the_file_is_kept_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(OLD)
        connection.execute("INSERT INTO meta VALUES ('schema_version', '1')")
        connection.commit()
        before = list(connection.iterdump())
    Store(path).close()
    with closing(sqlite3.connect(tmp_path / "labels.v1-backup.db")) as copy:
        assert list(copy.iterdump()) == before
    assert "schema 1 to schema 2; the old store is kept as" in capsys.readouterr().err
    Store(path).close()
    assert len(list(tmp_path.glob("*backup*"))) == 1, "once is enough"
    assert copy_aside(path, "v1-backup").name == "labels.v1-backup-2.db", "no copy is overwritten"


def test_a_migration_that_fails_changes_nothing(old_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.migrations.renumber", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            Store(old_store, backed_up=True)
    with closing(Store(old_store, backed_up=True)) as store:
        assert store.rankings() == [EXPECTED]


def test_a_server_is_changed_only_on_the_users_word(postgres_url: str) -> None:
    with closing(Store(postgres_url)) as store, store.write() as connection:
        connection.exec_driver_sql("UPDATE meta SET value = '1' WHERE name = 'schema_version'")
    with pytest.raises(DataError, match=r"keep a copy with pg_dump, then run `rlhf data migrate --i-have-a-backup`"):
        Store(postgres_url)


def test_a_newer_store_is_refused_and_left_alone(store_url: str) -> None:
    with closing(Store(store_url)) as store, store.write() as connection:
        connection.exec_driver_sql("UPDATE meta SET value = '3' WHERE name = 'schema_version'")
    with pytest.raises(
        DataError, match="has schema 3, this version of rlhf knows 2: use the version of rlhf that wrote"
    ):
        Store(store_url, backed_up=True)

"""Whatever is changed behind the store's back is found; what the store itself does never is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import renewal, schema
from rlhf.event_log import GENESIS, event_hash, payload_hash
from rlhf.store import Judgement, Store, add_event, add_ranking, withdraw
from rlhf.types import DataError, Ranking
from rlhf.verification import Verdict, verify

A = Ranking("p", ("x", "y", "z"), (1, 2, None), "ann", (2, 0, 1), {"unclear": True, "marks": ["late"]}, "why", 3.25)
B = Ranking([{"role": "user", "content": "q ü"}], ("x", "y"), (2, 1), "bob")
SIMULATED = replace(A, annotator="simulated-1")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        fill(store)
        yield store


def fill(store: Store) -> None:
    """A changed mind, a withdrawn ranking, a forgotten one, and notes."""
    store.import_rankings([A, B, SIMULATED])
    store.import_rankings([replace(A, ranks=(3, 2, 1))])
    with store.write() as connection:
        add_event(connection, "note", "ann", text="a note")
        assert withdraw(connection, 2)
        assert not withdraw(connection, 2)
        add_ranking(connection, 2, "k2", Judgement((1, 1)), ["too_fast"])
        assert withdraw(connection, 2)
    renewal.forget(store, round=0, samples=False)


def look(store: Store, known: str | None = None) -> Verdict:
    with store.read() as connection:
        return verify(connection, known)


@contextmanager
def behind(store: Store) -> Iterator[sa.Connection]:
    """A connection of someone with the database's own tools: foreign keys do not hold. Taken back at the end."""
    with store.engine.connect() as connection:
        sqlite = connection.dialect.name == "sqlite"
        if sqlite:
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
            connection.exec_driver_sql("BEGIN")
        else:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        try:
            yield connection
        finally:
            connection.rollback()
            connection.invalidate()


def faults_after(store: Store, *statements: str, known: str | None = None) -> tuple[str, ...]:
    with behind(store) as connection:
        for statement in statements:
            assert connection.exec_driver_sql(statement).rowcount != 0, f"{statement} changes nothing"
        return verify(connection, known).faults


def test_what_the_store_does_holds(store: Store) -> None:
    verdict = look(store)
    assert verdict.faults == ()
    assert verdict.holds
    assert (verdict.events, verdict.rankings, verdict.erased) == (15, 4, 0)
    store.import_rankings([B])
    assert look(store, known=verdict.head).holds


def test_an_empty_store_holds(store_url: str) -> None:
    with closing(Store(store_url)) as store:
        assert look(store) == Verdict(0, 0, 0, f"0:{GENESIS}", ())


EVENTS = [
    ("UPDATE events SET at = '2020' WHERE id = 3", "event 3 was changed"),
    ("UPDATE events SET kind = 'note' WHERE id = 3", "event 3 was changed"),
    ("UPDATE events SET item_id = 7 WHERE id = 3", "event 3 was changed"),
    ("UPDATE events SET item_id = NULL WHERE id = 3", "event 3 was changed"),
    ("UPDATE events SET hash = 'ab' WHERE id = 3", "event 4 does not follow"),
    ("UPDATE events SET previous = 'ab' WHERE id = 3", "event 3 does not follow"),
    ("UPDATE events SET id = 99 WHERE id = 3", "event 3 is missing"),
    ("DELETE FROM events WHERE id = 3", "event 3 is missing"),
    ("DELETE FROM events WHERE id = 1", "event 1 is missing"),
    ("DELETE FROM events WHERE id = 15", "cut short"),
    ("DELETE FROM events WHERE id > 9", "cut short"),
    ("DELETE FROM events", "cut short"),
]
PAYLOADS = [
    ("UPDATE payloads SET body = replace(body, 'a note', 'another')", "what event 11 says was changed"),
    ("UPDATE payloads SET annotator = 'eve' WHERE event_id = 11", "what event 11 says was changed"),
    ("UPDATE payloads SET annotator = NULL WHERE event_id = 11", "what event 11 says was changed"),
    ("UPDATE payloads SET salt = 'x' WHERE event_id = 11", "what event 11 says was changed"),
    ("UPDATE payloads SET body = NULL WHERE event_id = 11", "gone, and no erasure names it"),
    ("DELETE FROM payloads WHERE event_id = 11", "what event 11 says is missing"),
    ("INSERT INTO payloads VALUES (77, NULL, '', '{}')", "1 payloads belong to no event"),
]
RANKINGS = [
    ("UPDATE rankings SET ranks = '[1, 2, 3]' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET ranks = '[]' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET presented_order = NULL WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET flags = '{}' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET marks = '[]' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET rationale = 'because' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET seconds = 3.26 WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET guideline_version = 2 WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET created_at = '2020' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET idempotency_key = 'k' WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET version = 9 WHERE id = 1", "ranking 1 is not as event"),
    ("UPDATE rankings SET active = false WHERE active", "does not stand, but the log says otherwise"),
    ("UPDATE rankings SET active = true WHERE idempotency_key = 'k2'", "stands, but the log says otherwise"),
    ("UPDATE rankings SET event = 1 WHERE id = 1", "ranking 1 is not in the log"),
    ("DELETE FROM rankings WHERE id = 1", "is missing"),
    ("UPDATE assignments SET annotator = 'eve' WHERE annotator = 'ann'", "ranking 1 is not as event"),
    ("UPDATE assignments SET item_id = 2 WHERE annotator = 'ann'", "ranking 1 is not as event"),
]
ITEMS = [
    ("UPDATE completions SET text = 'better' WHERE item_id = 1 AND position = 0", "item 1 was changed"),
    ("UPDATE items SET round = 3 WHERE id = 1", "item 1 was changed"),
    ("UPDATE items SET key = 'k' WHERE id = 1", "item 1 was changed"),
    ("DELETE FROM completions WHERE item_id = 1 AND position = 2", "item 1 was changed"),
    ("DELETE FROM items WHERE id = 1", "item 1 is missing"),
    (
        "INSERT INTO items (id, key, prompt_key, prompt, round) VALUES (9, 'k', 'k', '\"p\"', 0)",
        "item 9 is not in the log",
    ),
    ("UPDATE assignments SET state = 'done' WHERE annotator = 'ann'", "came late, but its item says otherwise"),
]


def test_every_change_is_found(store: Store) -> None:
    for statement, sign in [*EVENTS, *PAYLOADS, *RANKINGS, *ITEMS]:
        faults = faults_after(store, statement)
        assert any(sign in fault for fault in faults), (statement, faults)
    assert look(store).holds, "each was taken back"


def test_a_cut_tail_shows_even_where_the_head_was_put_back(store: Store) -> None:
    before = look(store).head
    with store.read() as connection:
        last = connection.exec_driver_sql("SELECT hash FROM events WHERE id = 14").scalar()
    cut = (
        "DELETE FROM payloads WHERE event_id = 15",
        "DELETE FROM events WHERE id = 15",
        f"UPDATE meta SET value = '14:{last}' WHERE name = 'log_head'",
    )
    assert "the log ended with event 15 before, and now ends with event 14" in faults_after(store, *cut, known=before)


def test_a_log_written_anew_shows_against_an_earlier_head(store: Store) -> None:
    before = look(store).head
    with store.read() as connection:
        row = connection.exec_driver_sql("SELECT * FROM events WHERE id = 15").mappings().one()
    columns = {name: row[name] for name in ("id", "kind", "item_id", "payload_hash", "previous")}
    new = event_hash(at="2020", **columns)
    anew = (
        f"UPDATE events SET at = '2020', hash = '{new}' WHERE id = 15",
        f"UPDATE meta SET value = '15:{new}' WHERE name = 'log_head'",
    )
    assert faults_after(store, *anew) == (), "nobody could tell from the store alone"
    assert faults_after(store, *anew, known=before) == (
        "event 15 is not the one that was there: the log was written anew",
    )
    with pytest.raises(DataError, match="no head of a log"):
        look(store, "yesterday")


def test_hashes_are_those_of_the_written_rule() -> None:
    """Worked out by `sha256sum` on the texts as documented."""
    assert payload_hash("salt", None, '{"a":1}') == ("3b390b4f104f871560da3a3f712d0eef4facbf62eb4631f56f3f5475faae355a")
    assert event_hash(id=1, at="2026", kind="note", item_id=None, payload_hash="ab", previous=GENESIS) == (
        "45b16299c0ae3c7db946057408e37bf7d63cf59c2e82ef7f64ff82cf118f01b2"
    )


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with closing(Store(tmp_path_factory.mktemp("filled") / "labels.db")) as store:
        fill(store)
        yield store


CELLS = {table: [each.name for each in schema.tables.tables[table].c] for table in ("events", "payloads", "rankings")}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    cell=st.sampled_from([(table, column) for table, columns in CELLS.items() for column in columns]),
    place=st.integers(0, 100),
    value=st.none() | st.integers(-9, 99) | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
)
def test_any_edit_of_any_cell_is_found(filled: Store, cell: tuple[str, str], place: int, value: object) -> None:
    """Any value of the log and the rankings, changed to any other one, but for the names of rows."""
    table, column = cell
    key = "event_id" if table == "payloads" else "id"
    if column == key:
        return
    with behind(filled) as connection:
        rows = connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY {key}").mappings().all()
        row = rows[place % len(rows)]
        query = sa.text(f"UPDATE {table} SET {column} = :v WHERE {key} = :k")
        try:
            connection.execute(query, {"v": value, "k": row[key]})
        except sa.exc.IntegrityError:
            return  # the database itself refuses it
        query = sa.text(f"SELECT {column} FROM {table} WHERE {key} = :k")
        now = connection.execute(query, {"k": row[key]}).scalar()
        assert verify(connection).holds == (now == row[column])

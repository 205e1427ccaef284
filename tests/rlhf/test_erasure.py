"""A person who is erased is nowhere: not in a table, not in the bytes of the files; and the log still verifies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from rlhf import schema
from rlhf.database import sqlite_path
from rlhf.erasure import clean, erase
from rlhf.store import Judgement, Store, add_event, add_ranking, insert, withdraw
from rlhf.types import DataError, Ranking
from rlhf.verification import verify

NAME = "Zo\u00eb Qxv\u0142ad"
WORDS = ("NOTEWORD", "WHYWORD", "DRAFTWORD", "REASONWORD", "ANSWERWORD")
A = Ranking("p", ("x", "y"), (1, 2), NAME, (1, 0), {"unclear": True, "note": "NOTEWORD"}, "WHYWORD " * 900, 3.0)
B = replace(A, annotator="bob", flags={"note": "bob's"}, rationale="his", ranks=(2, 1))


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        fill(store)
        yield store


def fill(store: Store) -> None:
    store.import_rankings([A, B, replace(A, prompt="q")])
    store.import_rankings([replace(A, ranks=(2, 1))])
    with store.write() as connection:
        assert withdraw(connection, 3)
        add_ranking(connection, 2, "again", Judgement((1, 1), rationale="still his"))
        user = insert(connection, schema.users, {"name": NAME, "role": "admin", "created_at": "2026"})
        session = {"token_hash": "t", "user_id": user, "csrf": "c", "created_at": 1.0, "seen_at": 1.0}
        connection.execute(sa.insert(schema.sessions).values(session))
        invite = {"role": "annotator", "expires_at": 1.0}
        for token, values in {
            "i1": {"name": NAME, "created_by": "bob"},
            "i2": {"name": "bob", "created_by": NAME},
            "i3": {"created_by": "bob", "used_by": NAME},
        }.items():
            connection.execute(sa.insert(schema.invites).values(token_hash=token, **invite, **values))
        connection.execute(sa.insert(schema.drafts).values(assignment_id=1, body={"w": "DRAFTWORD"}, saved_at="2026"))
        result = {"annotator": NAME, "guideline_version": 1, "answers": ["ANSWERWORD"], "passed": True}
        insert(connection, schema.quiz_results, {**result, "created_at": "2026"})
        add_event(connection, "skipped", NAME, 1, reason="REASONWORD")
        add_event(connection, "paused", "bob", user=NAME, list=[{"who": NAME}])
        add_event(connection, "note", "bob", text="nothing to do with it")


def everything(store: Store) -> str:
    with store.read() as connection:
        return "\n".join(
            repr(tuple(row))
            for table in schema.tables.sorted_tables
            for row in connection.exec_driver_sql(f"SELECT * FROM {table.name}")
        )


FORMS = (
    NAME,
    NAME.encode("unicode_escape").decode(),
    "\\\\".join(NAME.encode("unicode_escape").decode().split("\\")),
    *WORDS,
)


def test_the_person_is_in_no_table_and_the_rankings_stay(store: Store) -> None:
    before = store.rankings()
    assert all(any(form in everything(store) for form in FORMS if word in form) for word in WORDS)
    pseudonym = erase(store, NAME)
    assert pseudonym.startswith("erased-")
    assert not any(form in everything(store) for form in FORMS)
    expected = [
        replace(each, annotator=pseudonym, rationale=None, flags={"unclear": True}) if each.annotator == NAME else each
        for each in before
    ]
    assert sorted(store.rankings(), key=repr) == sorted(expected, key=repr)
    with store.read() as connection:
        verdict = verify(connection)
        last = connection.execute(
            sa.select(schema.payloads).join(schema.events).where(schema.events.c.kind == "erased")
        ).one()
        bodies = connection.scalars(sa.select(schema.payloads.c.body).where(schema.payloads.c.annotator == "bob")).all()
        assert connection.exec_driver_sql("SELECT count(*) FROM users").scalar() == 0
        assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 0
        assert connection.exec_driver_sql("SELECT name, created_by FROM invites").all() == [("bob", pseudonym)]
    assert verdict.faults == ()
    assert verdict.erased == 9, "3 imports, 3 rankings, a withdrawal and a skip, and another person's event of her"
    assert pseudonym in last.body
    assert sum(body is None for body in bodies) == 1, "of bob's events only the one that names the person"


def test_what_stays_of_an_erased_person_is_still_checked(store: Store) -> None:
    erase(store, NAME)
    with store.write() as connection:
        changed = sa.update(schema.rankings).where(schema.rankings.c.id == 1)
        connection.execute(changed.values(ranks=[2, 2]))
    with store.read() as connection:
        assert any("ranking 1 is not as event" in each for each in verify(connection).faults)


def test_work_goes_on_and_another_can_be_erased(store: Store) -> None:
    first = erase(store, NAME)
    second = erase(store, "bob")
    assert first != second
    store.import_rankings([B])
    with store.read() as connection:
        assert verify(connection).faults == ()
    assert {each.annotator for each in store.rankings()} == {first, second, "bob"}


def test_an_unknown_name_is_refused(store: Store) -> None:
    before = everything(store)
    with pytest.raises(DataError, match="knows nobody named 'Zoe'"):
        erase(store, "Zoe")
    assert everything(store) == before


def test_the_bytes_of_the_files_hold_nothing(tmp_path: Path) -> None:
    def found() -> set[str]:
        data = b"".join(each.read_bytes() for each in tmp_path.iterdir())
        return {form for form in FORMS if form.encode() in data}

    with closing(Store(tmp_path / "labels.db")) as store:
        fill(store)
        assert {*WORDS, NAME} <= found()
        erase(store, NAME)
        assert found() == set(), "while the store is open"
    assert found() == set()


def test_an_open_reader_is_told_and_cleaning_later_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.erasure.BUSY_SECONDS", 0.2)
    path = tmp_path / "labels.db"
    with closing(Store(path)) as store, closing(Store(path)) as other:
        fill(store)
        with other.read() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM items")
            with pytest.raises(DataError, match=r"is now erased-.*, but traces may be left.*`rlhf data clean`"):
                erase(store, NAME)
        assert NAME not in everything(store)
        clean(store)
    assert not any(form.encode() in path.read_bytes() for form in FORMS)


def test_who_was_named_beside_somebody_erased_before_can_be_erased_too(store: Store) -> None:
    with store.write() as connection:
        add_event(connection, "joined", "root", role="admin", by="the command line")
        add_event(connection, "paused", "carol", by="root")
    erase(store, "root")
    erase(store, "carol")
    assert "carol" not in everything(store)
    with store.read() as connection:
        assert verify(connection).holds


def test_a_name_that_is_a_word_of_ours_is_not_mistaken_for_it(store: Store) -> None:
    with store.write() as connection:
        add_event(connection, "joined", "admin", role="annotator", by="root")
        add_event(connection, "joined", "bob", role="admin", by="root")
    erase(store, "admin")
    with store.read() as connection:
        query = sa.select(schema.payloads.c.body).where(schema.payloads.c.annotator == "bob")
        assert connection.scalars(query.order_by(schema.payloads.c.event_id)).all()[-1] is not None


def test_whatever_an_imported_flag_says_is_erased(store: Store) -> None:
    said = {"comment": "I am FLAGWORD", "ratings": {"helpful": [1, 2]}, "unclear": True, "marks": ["late"]}
    store.import_rankings([replace(A, prompt="r", annotator="dora", flags=said)])
    pseudonym = erase(store, "dora")
    assert "FLAGWORD" not in everything(store)
    (kept,) = store.rankings([pseudonym], late=True)
    assert kept.flags == {"ratings": {"helpful": [1, 2]}, "unclear": True, "marks": ["late"]}


def test_a_name_that_is_a_common_word_takes_nothing_else_away(store: Store) -> None:
    with store.write() as connection:
        add_event(connection, "note", "text", text="text of others stays where it is")
    erase(store, "text")
    with store.read() as connection:
        bodies = connection.scalars(sa.select(schema.payloads.c.body)).all()
    assert sum(body is None for body in bodies) == 1
    assert sqlite_path(store.name) is None or store.counts().items == 2

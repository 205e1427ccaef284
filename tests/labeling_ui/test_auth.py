"""Accounts, with a clock of our own: who gets in, for how long, and what the store keeps of it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from argon2 import PasswordHasher

from labeling_ui import auth
from labeling_ui.auth import ABSOLUTE_SECONDS, IDLE_SECONDS, Accounts
from labeling_ui.passwords import Hashes, Refused, checked_name, checked_password
from labeling_ui.person import Person
from rlhf.schema import invites, payloads, sessions, users
from rlhf.store import Store
from rlhf.types import DataError
from tests.labeling_ui.clock import Clock

PASSWORD, OTHER = "correct horse battery", "another five words of mine"
QUICK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.db")


@pytest.fixture
def accounts(store: Store, clock: Clock) -> Accounts:
    return Accounts(store, clock, Hashes(QUICK))


@pytest.fixture
def anna(accounts: Accounts) -> auth.Login:
    return accounts.join(accounts.invite("annotator", "anna"), "", PASSWORD)


def refused(what: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(Refused) as found:
        what()
    return found.value.field, str(found.value)


def everything_in(store: Store) -> str:
    """All that the file holds, as text."""
    with store.read() as connection:
        tables = sa.inspect(connection).get_table_names()
        return repr([connection.exec_driver_sql(f"SELECT * FROM {name}").all() for name in tables])


def log(store: Store) -> list[tuple[str | None, dict[str, Any]]]:
    with store.read() as connection:
        rows = connection.execute(sa.select(payloads).order_by(payloads.c.event_id)).all()
    return [(row.annotator, json.loads(row.body)) for row in rows]


# ------------------------------------------------------------------------------------------------- joining, logging in


def test_a_guest_joins_once_and_logs_in_with_the_role_of_the_invitation(accounts: Accounts) -> None:
    invite = accounts.invite("admin", by="root")
    assert accounts.invitation(invite).role == "admin"
    joined = accounts.join(invite, " anna ", PASSWORD)
    assert joined.session.person == Person("anna", "admin")
    assert accounts.session(joined.token) == joined.session
    assert refused(lambda: accounts.join(invite, "eve", PASSWORD))[0] == "form"
    assert refused(lambda: accounts.invitation(invite))[0] == "form"
    assert accounts.login("anna", PASSWORD).session.person == Person("anna", "admin")
    assert [account.name for account in accounts.people()] == ["anna"]


def test_an_invitation_ends_and_a_name_in_it_wins(accounts: Accounts, clock: Clock) -> None:
    invite = accounts.invite("annotator", "bert", days=1)
    clock.now += 86_399
    assert accounts.join(invite, "eve", PASSWORD).session.person.name == "bert"
    late = accounts.invite("annotator", days=1)
    clock.now += 86_401
    assert refused(lambda: accounts.join(late, "eve", PASSWORD)) == ("form", auth.NOT_INVITED)
    assert accounts.invitations() == []


def test_two_guests_with_one_invitation_are_one_account(accounts: Accounts) -> None:
    invite, results = accounts.invite("annotator"), []

    def join(name: str) -> None:
        try:
            results.append(accounts.join(invite, name, PASSWORD).session.person.name)
        except Refused as error:
            results.append(error.field)

    threads = [threading.Thread(target=join, args=(f"guest{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results)[:5] == ["form"] * 5
    assert len(accounts.people()) == 1


def test_names_that_are_taken_or_have_ranked_are_not_given_away(accounts: Accounts, anna: auth.Login) -> None:
    from labeling_ui.assignment import Policy
    from labeling_ui.service import LabelService
    from rlhf.types import Completion

    accounts.store.add_completions("p", [Completion("x", "m", 0), Completion("y", "m", 1)])
    LabelService(accounts.store, Policy()).next_task("me")
    invite = accounts.invite("admin")
    for name, says in (
        ("anna", "taken"),
        ("me", "has ranked here before"),
        ("simulated-1", "simulated"),
        ("Simulated-2", "simulated"),
    ):
        field, text = refused(lambda name=name: accounts.join(invite, name, OTHER))
        assert field == "name"
        assert says in text
    assert accounts.login("anna", PASSWORD).session.person.role == "annotator"
    mine = accounts.join(accounts.invite("annotator", "me"), "", OTHER)
    assert mine.session.person.name == "me"
    assert refused(lambda: accounts.invite("admin", "anna"))[0] == "name"


@pytest.mark.parametrize(
    ("password", "says"),
    [
        ("short", "at least 10"),
        ("x" * 201, "at most 200"),
        ("aaaaaaaaaaaaa", "first that others"),
        ("password12345", "first that others"),
        ("0123456789012", "Digits alone"),
        ("anna anna!", "name"),
    ],
)
def test_weak_passwords_are_refused_with_what_to_do(accounts: Accounts, password: str, says: str) -> None:
    invite = accounts.invite("annotator", "anna")
    field, text = refused(lambda: accounts.join(invite, "", password))
    assert (field, says in text) == ("password", True)
    assert accounts.people() == []
    assert accounts.invitation(invite).name == "anna"  # it is not used up by that


def test_the_same_letters_are_the_same_password_however_they_were_typed(accounts: Accounts) -> None:
    accounts.join(accounts.invite("annotator", "zoe"), "", "cafe\u0301 au lait, s'il vous")
    assert accounts.login("zoe", "caf\u00e9 au lait, s'il vous").session.person.name == "zoe"


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "a\nb", "a\x00b", "a  b", "<b>", "a/b", 'a"b', "\u202eanna"])
def test_names_that_could_mislead_are_refused(name: str) -> None:
    assert refused(lambda: checked_name(name))[0] == "name"


def test_passwords_are_kept_as_argon2id_and_tokens_as_hashes(store: Store, clock: Clock) -> None:
    accounts = Accounts(store, clock)  # with the parameters of the real thing
    invite = accounts.invite("admin", "anna")
    login = accounts.join(invite, "", PASSWORD)
    with store.read() as connection:
        kept = connection.scalars(sa.select(users.c.password_hash)).one()
        assert kept.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
        assert connection.scalars(sa.select(sessions.c.token_hash)).one() == sha256(login.token)
        assert connection.scalars(sa.select(invites.c.token_hash)).one() == sha256(invite)
    text = everything_in(store)
    assert not [secret for secret in (PASSWORD, login.token, invite) if secret in text]
    assert min(len(login.token), len(invite)) >= 43  # 256 bits


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_hash_of_older_parameters_is_renewed_at_login(store: Store, clock: Clock) -> None:
    old = Accounts(store, clock, Hashes(QUICK))
    old.join(old.invite("annotator", "anna"), "", PASSWORD)
    Accounts(store, clock, Hashes(PasswordHasher(2, 16, 1))).login("anna", PASSWORD)
    with store.read() as connection:
        assert "m=16,t=2" in connection.scalars(sa.select(users.c.password_hash)).one()


# ------------------------------------------------------------------------------------------------------------ lockout


def test_five_wrong_passwords_make_the_account_wait_longer_and_longer(
    accounts: Accounts, anna: auth.Login, clock: Clock
) -> None:
    for _ in range(5):
        assert refused(lambda: accounts.login("anna", OTHER)) == ("form", auth.WRONG)
    for pause in (30, 60, 120, 240, 480, 900, 900):
        assert refused(lambda: accounts.login("anna", PASSWORD)) == ("form", auth.WRONG)
        clock.now += pause - 0.5
        assert refused(lambda: accounts.login("anna", PASSWORD)) == ("form", auth.WRONG)
        clock.now += 1
        assert refused(lambda: accounts.login("anna", OTHER)) == ("form", auth.WRONG)
    clock.now += 901
    accounts.login("anna", PASSWORD)
    for _ in range(4):  # a right one makes the count begin again
        refused(lambda: accounts.login("anna", OTHER))
    assert accounts.login("anna", PASSWORD).session.person.name == "anna"
    assert accounts.session(anna.token) == anna.session  # who is in stays in


def test_many_guesses_at_once_are_no_way_around_the_pause(store: Store, clock: Clock, anna: auth.Login) -> None:
    looked_at: list[str] = []

    class Counting(Hashes):
        def fits(self, kept: str | None, password: str) -> bool:
            looked_at.extend(["kept"] if kept else [])
            time.sleep(0.05)
            return super().fits(kept, password)

    accounts = Accounts(store, clock, Counting(QUICK))
    threads = [threading.Thread(target=lambda: refused(lambda: accounts.login("anna", OTHER))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looked_at) == 5


def test_unknown_names_get_the_same_answer_after_about_the_same_time(store: Store, clock: Clock) -> None:
    accounts = Accounts(store, clock)
    accounts.join(accounts.invite("annotator", "anna"), "", PASSWORD)
    locked = accounts.join(accounts.invite("annotator", "locked"), "", PASSWORD)
    assert locked.session.person.name == "locked"
    for _ in range(5):
        refused(lambda: accounts.login("locked", OTHER))

    def seconds(name: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert refused(lambda: accounts.login(name, OTHER)) == ("form", auth.WRONG)
            times.append(time.perf_counter() - start)
        return min(times)

    known = seconds("anna")
    assert seconds("nobody") == pytest.approx(known, rel=0.5)
    assert seconds("no\x00body") == pytest.approx(known, rel=0.5)
    assert seconds("locked") == pytest.approx(known, rel=0.5)


# ----------------------------------------------------------------------------------------------------------- sessions


def test_a_session_ends_when_idle_or_old_and_use_keeps_it(accounts: Accounts, anna: auth.Login, clock: Clock) -> None:
    start = clock.now
    clock.now += IDLE_SECONDS - 1
    assert accounts.session(anna.token) == anna.session
    while clock.now - start < ABSOLUTE_SECONDS - IDLE_SECONDS:
        clock.now += IDLE_SECONDS - 1
        assert accounts.session(anna.token) == anna.session
    clock.now = start + ABSOLUTE_SECONDS + 1
    assert accounts.session(anna.token) is None
    idle = accounts.login("anna", PASSWORD)
    clock.now += IDLE_SECONDS + 1
    assert accounts.session(idle.token) is None
    accounts.login("anna", PASSWORD)
    with accounts.store.read() as connection:
        assert len(connection.execute(sa.select(sessions)).all()) == 1  # what has ended is swept away


def test_sessions_survive_a_restart(accounts: Accounts, anna: auth.Login, clock: Clock) -> None:
    again = Accounts(Store(accounts.store.name), clock, Hashes(QUICK))
    assert again.session(anna.token) == anna.session


def test_a_login_takes_the_place_of_the_session_before(accounts: Accounts, anna: auth.Login) -> None:
    second = accounts.login("anna", PASSWORD, replacing=anna.token)
    assert second.token != anna.token
    assert second.session.csrf != anna.session.csrf
    assert accounts.session(anna.token) is None


def test_logout_ends_one_session_and_a_new_password_all(accounts: Accounts, anna: auth.Login) -> None:
    second, third = accounts.login("anna", PASSWORD), accounts.login("anna", PASSWORD)
    accounts.logout(second.token)
    assert [accounts.session(each.token) is None for each in (anna, second, third)] == [False, True, False]
    assert refused(lambda: accounts.change_password("anna", OTHER, OTHER))[0] == "old"
    assert refused(lambda: accounts.change_password("anna", PASSWORD, "short"))[0] == "password"
    fresh = accounts.change_password("anna", PASSWORD, OTHER)
    assert [accounts.session(each.token) is None for each in (anna, third, fresh)] == [True, True, False]
    assert refused(lambda: accounts.login("anna", PASSWORD)) == ("form", auth.WRONG)
    assert accounts.login("anna", OTHER).session.person.name == "anna"


def test_a_new_password_that_will_not_do_is_no_wrong_one(accounts: Accounts, anna: auth.Login) -> None:
    for _ in range(6):
        assert refused(lambda: accounts.change_password("anna", PASSWORD, "short"))[0] == "password"
    assert accounts.login("anna", PASSWORD).session.person.name == "anna"


@pytest.mark.parametrize("token", [None, "", "x", "0" * 43, "\udcff"])
def test_made_up_tokens_are_nobodys(accounts: Accounts, anna: auth.Login, token: str | None) -> None:
    assert accounts.session(token) is None
    assert accounts.session(sha256(anna.token)) is None  # what the store holds opens nothing


# ------------------------------------------------------------------------------------------------------------- people


def test_pausing_and_removing_the_password(accounts: Accounts, anna: auth.Login) -> None:
    accounts.pause("anna")
    assert accounts.people()[0].paused
    assert accounts.session(anna.token) == anna.session
    accounts.resume("anna")
    assert not accounts.people()[0].paused
    made = accounts.invite("admin", by="anna")
    accounts.remove_password("anna")
    assert accounts.session(anna.token) is None
    assert refused(lambda: accounts.login("anna", PASSWORD)) == ("form", auth.WRONG)
    assert refused(lambda: accounts.invitation(made))[0] == "form"
    assert not accounts.people()[0].can_log_in
    back = accounts.join(accounts.invite("annotator", "anna"), "", OTHER)
    assert accounts.session(back.token) == back.session
    for action in (accounts.pause, accounts.resume, accounts.remove_password):
        with pytest.raises(DataError, match="no account 'nobody'"):
            action("nobody")


def test_an_older_invitation_does_not_let_back_in_who_was_shut_out(accounts: Accounts) -> None:
    older, newer = (accounts.invite("annotator", "anna") for _ in range(2))
    accounts.join(newer, "", PASSWORD)
    accounts.remove_password("anna")
    assert refused(lambda: accounts.join(older, "", OTHER))[0] == "form"


def test_who_is_shut_out_while_changing_the_password_stays_out(
    accounts: Accounts, anna: auth.Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = accounts._hashes.make

    def slowly(password: str) -> str:
        accounts.remove_password("anna")
        return make(password)

    monkeypatch.setattr(accounts._hashes, "make", slowly)
    assert refused(lambda: accounts.change_password("anna", PASSWORD, OTHER))[0] == "old"
    assert not accounts.people()[0].can_log_in
    assert accounts.session(anna.token) is None


def test_an_admin_is_one_who_can_log_in_or_join(accounts: Accounts) -> None:
    accounts.join(accounts.invite("annotator", "anna"), "", PASSWORD)
    assert not accounts.has_admin()
    invite = accounts.invite("admin", "root")
    assert accounts.has_admin()  # or the first one could never join
    accounts.join(invite, "", PASSWORD)
    assert accounts.has_admin()
    accounts.remove_password("root")
    assert not accounts.has_admin()


def test_what_changes_an_account_is_in_the_log_and_no_secret_is(accounts: Accounts, clock: Clock) -> None:
    accounts.join(accounts.invite("annotator", "anna", by="root"), "", PASSWORD)
    for _ in range(5):
        refused(lambda: accounts.login("anna", OTHER))
    clock.now += 31
    accounts.change_password("anna", PASSWORD, OTHER)
    accounts.pause("anna", by="root")
    accounts.resume("anna", by="root")
    accounts.remove_password("anna", by="root")
    by = {"by": "root"}
    said = [{"role": "annotator", **by}, {"role": "annotator", **by}, {}, {}, by, by, by]
    assert log(accounts.store) == [("anna", each) for each in said]


def test_the_whole_rule_book_for_passwords() -> None:
    for good in (PASSWORD, OTHER, "Tr0ub4dor&3x", "日本語のとても長い合言葉です", "1234 5678 9012 3456"):
        assert checked_password(good, "anna") == good

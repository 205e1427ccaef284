"""`rlhf accounts`, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from argon2 import PasswordHasher

from labeling_ui.auth import Accounts
from labeling_ui.passwords import Hashes
from rlhf import cli
from rlhf.store import Store

PASSWORD = "correct horse battery"


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(Store(tmp_path / "labels.db"), hashes=Hashes(PasswordHasher(1, 8, 1)))


def run(accounts: Accounts, *arguments: str) -> int:
    return cli.main(["accounts", *arguments, "--store", accounts.store.name])


def test_an_invitation_is_a_link_that_lets_one_person_in(
    accounts: Accounts, capsys: pytest.CaptureFixture[str]
) -> None:
    public = ("--public_url", "https://label.example.org/rank/")
    assert run(accounts, "invite", "--role", "admin", "--name", "root", *public, "--days", "0.5") == 0
    said = capsys.readouterr()
    address, _, token = said.out.strip().partition("/join?invite=")
    assert address == "https://label.example.org/rank"
    assert said.err.strip() == "lets root join as admin, once, within 0.5 days"
    assert accounts.join(token, "", PASSWORD).session.person.role == "admin"
    assert run(accounts, "invite", "--port", "7999") == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:7999/join?invite=")


def test_list_pause_resume_and_remove_password(accounts: Accounts, capsys: pytest.CaptureFixture[str]) -> None:
    run(accounts, "list")
    assert "no accounts yet" in capsys.readouterr().out
    accounts.join(accounts.invite("annotator", "anna"), "", PASSWORD)
    accounts.invite("admin", by="anna")
    assert run(accounts, "pause", "anna") == 0
    assert "anna gets no more items" in capsys.readouterr().out
    run(accounts, "list")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("anna  annotator  paused, last seen 2")
    assert second.startswith("invited: anyone as admin by anna, until 2")
    assert run(accounts, "resume", "anna") == 0
    assert not accounts.people()[0].paused
    assert run(accounts, "remove-password", "anna") == 0
    capsys.readouterr()
    run(accounts, "list")
    assert capsys.readouterr().out == "anna  annotator  cannot log in\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "there is no command `accounts frobnicate`: it is one of invite, list"),
        (["pause"], "the following arguments are required: name"),
        (["pause", "nobody"], "there is no account 'nobody': `rlhf accounts list` shows them all"),
        (["list", "extra"], "unrecognized arguments: extra"),
        (["invite", "--role", "root"], "invalid choice: 'root'"),
        (["invite", "--days", "0"], "days is 0, but it must be above 0"),
        (["invite", "--days", "nan"], "days is nan, but it must be above 0"),
        (["invite", "--name", "a/b"], "A name has up to 64 letters"),
        (["invite", "--host", "0.0.0.0"], "pass --public_url"),
        (["invite", "--public_url", "http://lab"], "passwords would cross the network unencrypted"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    accounts: Accounts, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(accounts, *arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n"), says in said.err) == ("", 1, True), said.err
    assert accounts.invitations() == []


def test_no_store_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["accounts", "list", "--store", str(tmp_path / "none.db")]) == 2
    assert "there is no label store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["accounts"]) == 0
    assert "remove-password NAME" in capsys.readouterr().out
    assert "accounts" in cli._usage()


def test_label_with_accounts_names_the_command_that_invites_the_first_admin(
    accounts: Accounts, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from rlhf.types import Completion

    accounts.store.add_completions("p", [Completion("x", "m", 0), Completion("y", "m", 1)])
    where = ("--store", accounts.store.name, "--output", str(tmp_path / "label"))
    assert cli.main(["label", "--accounts", *where]) == 2
    assert f"`rlhf accounts invite --role admin --store {accounts.store.name} --port 7860`" in capsys.readouterr().err
    assert cli.main(["label", "--host", "0.0.0.0", *where]) == 2
    assert "--accounts true --public_url" in capsys.readouterr().err
    assert cli.main(["label", "--accounts", "--host", "0.0.0.0", *where]) == 2
    assert "pass --public_url" in capsys.readouterr().err

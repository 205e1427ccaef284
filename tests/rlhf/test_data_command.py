"""`rlhf data`: each command says what it did, and its exit status whether all is well."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from rlhf import cli
from rlhf.label_imports import import_file
from rlhf.store import Store
from rlhf.types import Completion, Ranking

A = Ranking("p", ("x", "y"), (1, 2), "ann", (1, 0), rationale="why", created_at="2026-01-02")
B = Ranking("p", ("x", "y"), (1, 1), "bob", created_at="2026-01-02")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(store_url: str, capsys: pytest.CaptureFixture[str]) -> Command:
    """`data("verify", ...)` -> exit status, stdout and stderr, on a store with two rankings."""
    with closing(Store(store_url)) as store:
        store.import_rankings([A, B])

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        status = cli.main(["data", command, "--store", store_url, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def tamper(store_url: str) -> None:
    with closing(Store(store_url)) as store, store.write() as connection:
        connection.exec_driver_sql("UPDATE rankings SET rationale = 'other' WHERE id = 1")


def test_verify(data: Command, store_url: str) -> None:
    status, out, _ = data("verify")
    assert status == 0
    assert "5 events, 2 rankings, all as it was written; head 5:" in out
    head = out.split()[-1]
    assert data("verify", "--head", head)[0] == 0
    tamper(store_url)
    status, out, _ = data("verify")
    assert status == 1
    assert out.splitlines()[1] == "  ranking 1 is not as event 3 has it"
    status, _, error = data("verify", "--head", "x")
    assert (status, "no head of a log" in error) == (2, True)


def test_backup_and_restore(data: Command, store_url: str, tmp_path: Path) -> None:
    status, out, _ = data("backup", "--out", tmp_path / "b.db")
    assert (status, "b.db: 5 events, 2 rankings" in out) == (0, True)
    tamper(store_url)
    status, _, error = data("restore", tmp_path / "b.db")
    assert (status, "--force" in error) == (2, True)
    status, out, _ = data("restore", tmp_path / "b.db", "--force")
    assert (status, "all as it was written" in out, "what was there is now" in out) == (0, True, True)
    assert data("verify")[0] == 0


def test_a_backup_has_a_name_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path / "labels.db").close()
    assert cli.main(["data", "backup", "--store", str(tmp_path / "labels.db")]) == 0
    assert Path(capsys.readouterr().out.split(": ")[0]).parent == tmp_path


def test_export(data: Command, tmp_path: Path) -> None:
    status, out, _ = data("export", "--out", tmp_path / "r.jsonl")
    assert (status, "r.jsonl: 2 rankings; card" in out) == (0, True)
    card = (tmp_path / "README.md").read_text()
    assert "| Items ranked by more than one annotator | 1 |" in card
    assert "| Pairwise agreement, ties left out | unknown: no item was ranked twice |" in card
    assert "| Pairwise agreement, a tie as half | 0.500" in card
    assert data("export", "--format", "preferences", "--ties", "drop", "--out", tmp_path / "p.jsonl")[1].count("1 pref")
    assert data("export", "--format", "events", "--out", tmp_path / "e.jsonl")[1].count("5 events")


def test_import_keeps_good_rows_and_names_bad_ones(data: Command, store_url: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "new", "completions": ["a", {"text": "b", "model": "other", "seed": 3}], "model": "mine"},
        {"prompt": "new", "completions": ["a"]},
        "not a row",
        {"prompt": "p", "completions": ["x", "y"], "ranks": [2, 1], "annotator": "eve"},
        {"prompt": "p", "completions": ["x", "y"], "ranks": [2, 7], "annotator": "eve"},
        {"prompt": "p", "completions": ["x", {"model": "m"}]},
        {"prompt": "p", "completions": ["x", {"text": "y", "seed": "one"}]},
        {"completions": ["x", "y"]},
        {"prompt": [{"role": "user", "content": "hi"}], "completions": ["x", ""]},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = data("import", file, "--round", 2)
    assert status == 1
    left_out = [line.removeprefix(f"{file}:") for line in out.splitlines()[:-1]]
    assert [line.split(":")[0] for line in left_out] == ["2", "3", "5", "6", "7", "8"]
    assert "at least 2" in left_out[0]
    assert "rank 7" in left_out[2]
    assert "seed of a completion is 'one', not a int" in left_out[4]
    assert "1 new rankings, 2 new prompts with completions, 0 rows known already, 6 rows left out" in out
    assert (
        "0 new rankings, 0 new prompts with completions, 3 rows known already" in data("import", file, "--round", 2)[1]
    )
    with closing(Store(store_url)) as store:
        first = store.items(2)[0]
        assert first.completions == (Completion("a", "mine", 0), Completion("b", "other", 3))
        assert {each.annotator for each in store.rankings()} == {"ann", "bob", "eve"}
    assert data("verify")[0] == 0


def test_import_makes_a_store(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"]}\n')
    with closing(Store(tmp_path / "new.db")) as store:
        assert import_file(store, tmp_path / "in.jsonl").items == 1


def test_erase(data: Command) -> None:
    status, out, _ = data("erase", "ann")
    assert (status, "the rankings stay under erased-" in out) == (0, True)
    assert "(2 of people who were erased)" in data("verify")[1]
    status, _, error = data("erase", "ann")
    assert (status, "knows nobody named 'ann'" in error) == (2, True)
    assert data("clean")[0] == 0


def test_events(data: Command) -> None:
    rows = [json.loads(line) for line in data("events")[1].splitlines()]
    assert [row["kind"] for row in rows] == ["item", "import", "ranking", "import", "ranking"]
    assert [json.loads(line)["id"] for line in data("events", "--last", 2)[1].splitlines()] == [4, 5]
    chosen = data("events", "--kind", "ranking", "--annotator", "ann", "--last", 9)[1].splitlines()
    assert [json.loads(line)["id"] for line in chosen] == [3]


def test_migrate_says_that_all_is_well(data: Command) -> None:
    assert "has the present schema" in data("migrate")[1]


def test_help_and_bad_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 0
    assert "erase" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "restore"])
    assert ended.value.code == 2
    assert cli.main(["data", "verify", "--store", "/nowhere/a.db"]) == 2
    assert "there is no label store at /nowhere/a.db" in capsys.readouterr().err


def test_no_torch(without_torch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    Store(tmp_path / "labels.db").close()
    code = "from rlhf import cli; sys.exit(cli.main(['data', 'export', '--store', sys.argv[1], '--out', sys.argv[2]]))"
    done = without_torch(code, str(tmp_path / "labels.db"), str(tmp_path / "r.jsonl"))
    assert done.returncode == 0, done.stderr

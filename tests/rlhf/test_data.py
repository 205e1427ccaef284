"""Reading data sets: every format, every way a row can be wrong, and the split."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import data
from rlhf.types import ConfigError, DataError, Demonstration, Ranking

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": "one\u2028two", "completion": " ü"}, {"prompt": "three", "completion": "4"}]
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
OTHER = {"role": "assistant", "content": "Go away."}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- sources


def as_jsonl(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl", *ROWS)


def as_gzip(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return folder / "a.jsonl.gz"


def as_json_array(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return folder / "a.json"


def as_csv(folder: Path) -> Path:
    text = 'prompt,completion\r\n"one\u2028two"," ü"\r\nthree,4\r\n'
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder / "a.csv"


def as_parquet(folder: Path) -> Path:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def as_folder(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("write", [as_jsonl, as_gzip, as_json_array, as_csv, as_parquet, as_folder])
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = write(tmp_path)
    found = list(data.read_rows(source))
    assert [row for _, row in found] == ROWS
    assert [where.startswith(f"{source}:") for where, _ in found] == [True, True]


def test_lines_are_counted_from_one_with_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [where for where, _ in data.read_rows(path)] == [f"{path}:1", f"{path}:3"]


def test_a_split_of_a_saved_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    both = DatasetDict({"test": Dataset.from_list(ROWS[:1]), "train": Dataset.from_list(ROWS[1:])})
    both.save_to_disk(str(tmp_path / "d"))
    assert data.read_prompts(tmp_path / "d") == ["three"]
    assert data.read_prompts(f"{tmp_path / 'd'}:test") == ["one\u2028two"]
    with pytest.raises(DataError, match="no split 'dev' but test, train"):
        data.read_prompts(f"{tmp_path / 'd'}:dev")


def test_a_function_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows_7.py").write_text(
        "def rows():\n    yield {'prompt': 'a'}\nnot_rows = 3\ndef text(): return 'x'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(data.read_rows("my_rows_7:rows")) == [("my_rows_7:rows:1", {"prompt": "a"})]
    with pytest.raises(DataError, match="returned a str, not rows"):
        list(data.read_rows("my_rows_7:text"))
    for spec, problem in {
        "my_rows_7:not_rows": "is a int, not a function",
        "my_rows_7:row": "has no 'row'; did you mean 'rows'",
        "no_such_module_7:rows": "no module 'no_such_module_7'",
        "my_rows_7": "write it as module:function",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            data.resolve(spec)


def test_a_module_that_misses_another_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_other_7.py").write_text("import not_installed_7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="needs_other_7 itself imports 'not_installed_7'"):
        data.resolve("needs_other_7:f")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', r"a\.jsonl:2: \[1\] is no row with named columns"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xff at column 13\)"),
        ("a.jsonl", b'{"prompt": " "}\n', r"a\.jsonl:1: prompt is empty"),
        ("a.jsonl", b'{"prompt": 3}\n', r"a\.jsonl:1: prompt is 3, not a text"),
        ("a.jsonl", b'{"prompt": "\\ud83d"}\n', r"a\.jsonl:1: prompt holds half a surrogate pair"),
        ("a.jsonl", b'{"prompt": "a\\u0000b"}\n', r"a\.jsonl:1: prompt holds a NUL character"),
        ("a.jsonl", b'{"prompt": [{"from": "human"}]}\n', r"a\.jsonl:1: a turn of prompt is \{'from': 'human'\}"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "JSON that cannot be read"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00broken", "gzip file is damaged"),
        ("a.csv", b"prompt,x\na,b\nc\n", r"a\.csv:3: this row has another number of columns"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.txt", b"hello", r"unknown file type '\.txt'"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        data.read_prompts(tmp_path / name)


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        data.read_prompts(tmp_path / "missing.jsonl")


def test_a_name_that_is_nothing_says_so() -> None:
    with pytest.raises(DataError, match="neither a file or folder here nor a data set"):
        data.read_prompts("nobody/nothing")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not saved by `datasets`"):
        data.read_prompts(tmp_path)


# --------------------------------------------------------------------------------------------------- data-set types


def test_prompts_in_every_form(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "text"},
        {"prompt": [{**USER, "id": 3}]},
        {"messages": [USER, REPLY]},
        {"messages": [USER]},
        {"prompt": "text", "messages": [USER, REPLY]},
    )
    assert data.read_prompts(path) == ["text", [USER], [USER], [USER], "text"]


def test_demonstrations_in_every_form(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "p", "completion": "c"},
        {"prompt": [USER], "completion": [REPLY]},
        {"messages": [USER, REPLY, USER, OTHER]},
    )
    assert data.read_demonstrations(path) == [
        Demonstration("p", "c"),
        Demonstration([USER], "Hello."),
        Demonstration([USER, REPLY, USER], "Go away."),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER]}, "does not end with the assistant's turn"),
        ({"messages": [REPLY]}, "holds the assistant's turn only"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": "p", "completion": None}, "completion is None, not a text"),
        ({"prompt": "p", "completion": [REPLY, USER]}, "must be one turn of the assistant, not 2"),
        (
            {"question": "p", "answer": "c"},
            "no column 'prompt'. Columns found: question, answer. .*--columns.prompt question",
        ),
        ({"prompt": "p", "text": "c"}, "no column 'completion'. .* Name it: --columns.completion NAME"),
    ],
)
def test_demonstrations_that_are_none(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{problem}"):
        data.read_demonstrations(path)


def test_columns_are_mapped_when_told_and_only_then(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"question": "p", "answer": "c"})
    columns = {"prompt": "question", "completion": "answer"}
    assert data.read_demonstrations(path, columns) == [Demonstration("p", "c")]
    with pytest.raises(DataError, match="no column 'query'"):
        data.read_prompts(path, {"prompt": "query"})
    with pytest.raises(ConfigError, match="did you mean 'prompt'"):
        data.read_prompts(path, {"promt": "question"})


def test_preferences_in_every_form(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        {"prompt": "p", "chosen": "same", "rejected": "same", "annotator": "a7"},
    )
    assert data.read_preferences(path) == [
        Ranking("p", ("good", "bad"), (1, 2), "preferences"),
        Ranking([USER], ("Hello.", "Go away."), (1, 2), "preferences"),
        Ranking([USER], ("Hello.", "Go away."), (1, 2), "preferences"),
        Ranking("p", ("same", "same"), (1, 1), "a7"),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "good", "rejected": "bad"}, "no column 'prompt'"),
        ({"prompt": "p", "better": "good", "rejected": "bad"}, "--columns.chosen better"),
        ({"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, OTHER]}, "share 1 turns and then have 3 and 1"),
    ],
)
def test_preferences_that_are_none(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{problem}"):
        data.read_preferences(write_lines(tmp_path / "a.jsonl", row))


# --------------------------------------------------------------------------------------------------------- rankings

FULL = Ranking(
    prompt=[USER],
    completions=("a\u2028", "b", "", "d"),
    ranks=(1, 2, 2, None),
    annotator="a7",
    presented_order=(2, 0, 1, 3),
    flags={"unsafe": True},
    rationale="because",
    seconds=41.2,
    round=3,
    guideline_version=2,
    created_at="2026-01-02T03:04:05+00:00",
)


def test_rankings_survive_a_file(tmp_path: Path) -> None:
    plain = Ranking("p", ("x", "y"), (1, 1), "me")
    data.write_rankings(tmp_path / "deep" / "r.jsonl", [FULL, plain])
    assert data.read_rankings(tmp_path / "deep" / "r.jsonl") == data.RankingFile([FULL, plain], [])
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["r.jsonl"]


def test_the_exchange_form_is_the_documented_one() -> None:
    assert list(data.ranking_to_json(FULL)) == [
        "prompt", "completions", "ranks", "annotator", "presented_order", "flags", "rationale", "seconds", "round",
        "guideline_version", "created_at",
    ]  # fmt: skip
    assert json.loads(json.dumps(data.ranking_to_json(FULL)))["ranks"] == [1, 2, 2, None]


GOOD = {"prompt": "p", "completions": ["x", "y"], "ranks": [1, 2], "annotator": "me"}


def test_bad_rankings_are_listed_and_good_ones_kept(tmp_path: Path) -> None:
    bad = {
        "rank 3 is not an integer from 1 to 2": {**GOOD, "ranks": [1, 3]},
        "rank True": {**GOOD, "ranks": [True, 2]},
        "1 ranks for 2 completions": {**GOOD, "ranks": [1]},
        "a ranking needs at least 2 completions": {**GOOD, "completions": ["x"], "ranks": [1]},
        "a completion is 3, not a text": {**GOOD, "completions": ["x", 3]},
        "there is no 'annotator'": {key: GOOD[key] for key in GOOD if key != "annotator"},
        "presented_order [0, 0] is not an order": {**GOOD, "presented_order": [0, 0]},
        "presented_order is [0, '1'], but": {**GOOD, "presented_order": [0, "1"]},
        "seconds is -1": {**GOOD, "seconds": -1},
        "seconds is 'x'": {**GOOD, "seconds": "x"},
        "flags is [], but it must be a dict": {**GOOD, "flags": []},
        "marks in flags is 'late'": {**GOOD, "flags": {"marks": "late"}},
        "flags cannot be kept": {**GOOD, "flags": {"x": float("nan")}},
        "rationale holds a NUL": {**GOOD, "rationale": "a\0b"},
        "created_at holds a NUL": {**GOOD, "created_at": "\0"},
        "guideline_version is 1000000000000000000000": {**GOOD, "guideline_version": 10**30},
        "round is 1.5": {**GOOD, "round": 1.5},
        "ranks is '12', but it must be a list": {**GOOD, "ranks": "12"},
    }
    path = write_lines(tmp_path / "r.jsonl", GOOD, *bad.values())
    with path.open("ab") as file:
        file.write(b"{broken\n\xff\n" + json.dumps(GOOD).encode() + b"\n")
    read = data.read_rankings(path)
    assert len(read.rankings) == 2
    assert [row.line for row in read.bad] == list(range(2, 2 + len(bad) + 2))
    for row, reason in zip(read.bad, [*bad, "not JSON", "not UTF-8"], strict=True):
        assert row.reason.startswith(reason), row


def test_a_file_of_bad_rankings_only_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable ranking; line 1: there is no 'completions'"):
        data.read_rankings(write_lines(tmp_path / "r.jsonl", {"prompt": "p"}))


def test_ranking_columns_are_mapped(tmp_path: Path) -> None:
    row = {"question": "p", "answers": ["x", "y"], "ranks": [1, 2], "annotator": "me"}
    read = data.read_rankings(write_lines(tmp_path / "r.jsonl", row), {"prompt": "question", "completions": "answers"})
    assert read.rankings == [Ranking("p", ("x", "y"), (1, 2), "me")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    data.write_rankings(path, [FULL])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        data.write_rankings(path, [FULL, Ranking("p", ("x", "y"), (1, 2), "me", flags={"a": object()})])
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["r.jsonl"]


# ------------------------------------------------------------------------------------------------------------ split


def test_the_split_is_by_prompt_and_near_its_share() -> None:
    prompts = [f"prompt {number}" for number in range(5000)]
    train, held_out = data.split(prompts * 2, 0.1, key=lambda prompt: prompt)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 10_000
    assert len(held_out) / 10_000 == pytest.approx(0.1, abs=3 * (0.09 / 5000) ** 0.5)
    assert data.split(prompts, 0.0, key=str) == (prompts, [])


def test_a_larger_share_keeps_what_was_held_out() -> None:
    prompts = [f"prompt {number}" for number in range(500)]
    small = {prompt for prompt in prompts if data.is_held_out(prompt, 0.1)}
    assert small < {prompt for prompt in prompts if data.is_held_out(prompt, 0.3)}


@given(st.text(min_size=1))
def test_a_text_and_its_conversation_fall_on_the_same_side(text: str) -> None:
    conversation = [{"role": "user", "content": text}]
    assert data.is_held_out(text, 0.5) == data.is_held_out(conversation, 0.5)
    assert data.prompt_key(text) != data.prompt_key(conversation)


def test_keys_do_not_depend_on_the_process(without_torch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "from rlhf.data import prompt_key; print(prompt_key([{'content': 'ü', 'role': 'user'}]))"
    assert without_torch(code).stdout.strip() == data.prompt_key([{"role": "user", "content": "ü"}])


def test_distinct_keeps_the_first_of_each() -> None:
    assert data.distinct(["b", "a", "b", [USER], "a", [dict(USER)]]) == ["b", "a", [USER]]


def test_nothing_that_is_read_imports_torch(tmp_path: Path) -> None:
    sources = [str(write(tmp_path)) for write in (as_jsonl, as_parquet, as_folder)]
    code = (
        "import sys; from rlhf.data import read_prompts\n"
        "print([len(read_prompts(source)) for source in sys.argv[1:]], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *sources], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[2, 2, 2] False", done.stderr

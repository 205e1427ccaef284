"""Commands that work, and the faults that `test_bad_input` adds to them, each with what the message must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import CHAT_TEMPLATE, make_tokenizer

LIMITS = "--max_prompt_tokens 32 --max_completion_tokens 6 --precision fp32 --output run --tracking.wandb off"
COMMANDS = {
    "sft": f"sft --model model --data demos.jsonl --held_out 0 --batch_size 4 --micro_batch_size 4 "
    f"--save_every 1 {LIMITS}",
    "sample": f"sample --model model --prompts prompts.jsonl --completions_per_prompt 2 --store run/labels.db {LIMITS}",
    "label": "label --store labels.db --simulate.utility mine:utility --output run --tracking.wandb off",
    "reward": f"reward --model model --rankings rankings.jsonl --held_out 0 --batch_size 8 {LIMITS}",
    "ppo": "ppo --model model --reward mine:good --prompts prompts.jsonl --held_out 0 --total_episodes 8 "
    f"--batch_size 4 --num_mini_batches 1 --micro_batch_size 4 --num_ppo_epochs 1 --save_every 1 {LIMITS}",
    "evaluate": "evaluate --policy model --baseline model --reward mine:good --prompts prompts.jsonl --split all "
    f"--num_prompts 4 --samples_per_prompt 1 --best_of_n 1 --bootstrap 100 {LIMITS}",
}
PROMPTS = [f"{start} {number}" for start in ("the film is", "a man and his dog") for number in range(4)]
RANKING = {"prompt": "the film is", "completions": [" good", " bad", " sad"], "ranks": [1, 2, 3], "annotator": "me"}
DEMONSTRATION = '{"prompt": "a", "completion": "b"}\n'
FUNCTIONS = """
import math
number = 3
def good(prompts, completions): return [float(len(c)) for c in completions]
def nan(prompts, completions): return [math.nan for c in completions]
def infinite(prompts, completions): return [-math.inf for c in completions]
def fails(prompts, completions): return [1 / 0 for c in completions]
def short(prompts, completions): return [1.0]
def words(prompts, completions): return ["good" for c in completions]
def nothing(prompts, completions): return None
def one(prompts, completions): return 1.0
def table(prompts, completions): return {c: 1.0 for c in completions}
def nested(prompts, completions): return [[1.0, 2.0] for c in completions]
def completions_only(completions): return [1.0 for c in completions]
def utility(prompt, completion): return float(sum(map(ord, completion)) % 7)
def utility_fails(prompt, completion): return [][0]
def utility_nan(prompt, completion): return math.nan
def rows_fail(): raise ConnectionError("no network")
def rows_none(): return None
"""


@dataclass(frozen=True)
class Case:
    """A fault: files that replace good ones, flags behind those of the command, or a change made to the folder."""

    command: str
    says: tuple[str, ...]
    flags: str = ""
    files: dict[str, str | bytes] = field(default_factory=dict)
    change: Callable[[Path], object] = lambda folder: None


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ranked(**changes: Any) -> dict[str, str | bytes]:
    return {"rankings.jsonl": lines(RANKING | changes)}


def demos(content: str | bytes, name: str = "demos.jsonl") -> dict[str, str | bytes]:
    return {name: content}


def other_tokenizer(folder: Path) -> None:
    """Exchange two words of the trained model's vocabulary."""
    file = folder / "trained" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    one, other = list(words)[100:102]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(content), encoding="utf-8")


def other_template(folder: Path) -> None:
    make_tokenizer(CHAT_TEMPLATE.replace("<assistant>", "<bot>")).save_pretrained(folder / "trained")


def cut(name: str) -> Callable[[Path], None]:
    """Leave the first half of a file."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


CASES: dict[str, Case] = {
    # ---- files
    "missing file": Case("sft", ("nowhere.jsonl", "there is no such file", "looked from"), "--data nowhere.jsonl"),
    "missing file without type": Case("sample", ("nowhere", "neither a file", "check the path"), "--prompts nowhere"),
    "a folder": Case("sample", ("model", "not saved by `datasets`", "name a file in it"), "--prompts model"),
    "another type": Case(
        "sft", ("demos.txt", "unknown file type '.txt'", ".jsonl"), "--data demos.txt", demos("a", "demos.txt")
    ),
    "empty file": Case("sft", ("demos.jsonl", "no rows", "give one a line"), files=demos("")),
    "not JSON": Case(
        "sft", ("demos.jsonl:2", "not JSON", "one object a line"), files=demos(DEMONSTRATION + '{"prompt":\n')
    ),
    "a list cut off": Case(
        "sft", ("a.json:2", "not JSON", "cut off"), "--data a.json", demos("[" + DEMONSTRATION + ",", "a.json")
    ),
    "no row": Case("sample", ("prompts.jsonl:1", "3 is no row", "{...}"), files={"prompts.jsonl": "3\n"}),
    "not UTF-8": Case(
        "sft",
        ("demos.jsonl:2", "not UTF-8", "0xe9 at column 16", "convert"),
        files=demos(DEMONSTRATION.encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n'),
    ),
    "not UTF-8, CSV": Case(
        "sft", ("a.csv:2", "not UTF-8", "convert"), "--data a.csv", demos(b"prompt,completion\ncaf\xe9,b\n", "a.csv")
    ),
    "UTF-16": Case(
        "sample",
        ("prompts.jsonl:1", "not UTF-8", "convert"),
        files={"prompts.jsonl": lines({"prompt": "a"}).encode("utf-16")},
    ),
    "CSV with BOM, ragged": Case(
        "sft",
        ("a.csv:2", "another number of columns", "in quotes"),
        "--data a.csv",
        demos(b"\xef\xbb\xbfprompt,completion\na,b,c\n", "a.csv"),
    ),
    "CSV with semicolons": Case(
        "sft", ("a.csv:2", "prompt;completion", "by commas"), "--data a.csv", demos("prompt;completion\na;b\n", "a.csv")
    ),
    "damaged parquet": Case(
        "sample", ("a.parquet", "not a readable parquet"), "--prompts a.parquet", {"a.parquet": b"PAR1"}
    ),
    "rows that fail": Case(
        "sample", ("mine:rows_fail", "ConnectionError: no network", "mine.py, line"), "--prompts mine:rows_fail"
    ),
    "rows that are none": Case(
        "sample", ("mine:rows_none", "NoneType", "iterable of dicts"), "--prompts mine:rows_none"
    ),
    # ---- columns and texts
    "another column": Case(
        "sample",
        ("prompts.jsonl:1", "no column 'prompt'", "--columns.prompt question"),
        files={"prompts.jsonl": lines({"question": "a"})},
    ),
    "no such column": Case("sample", ("no column 'q'", "found: prompt", "--columns.prompt"), "--columns.prompt q"),
    "no such name": Case("sample", ("columns.promt", "did you mean 'prompt'?"), "--columns.promt q"),
    "missing column": Case(
        "sft",
        ("demos.jsonl:2", "'completion'", "--columns.completion"),
        files=demos(DEMONSTRATION + lines({"prompt": "a"})),
    ),
    "empty prompt": Case(
        "sample",
        ("prompts.jsonl:2", "prompt is empty", "leave the row out"),
        files={"prompts.jsonl": lines({"prompt": "a"}, {"prompt": " "})},
    ),
    "no prompt": Case(
        "sample", ("prompts.jsonl:1", "prompt is None, not a text"), files={"prompts.jsonl": lines({"prompt": None})}
    ),
    "messages": Case(
        "sft",
        ("demos.jsonl:1", "a turn of messages", "role: ..., content: ..."),
        files=demos(lines({"messages": [{"from": "human", "value": "a"}]})),
    ),
    # ---- what a model can read
    "every prompt too long": Case("sample", ("longer than max_prompt_tokens = 2", "raise it"), "--max_prompt_tokens 2"),
    "no demonstration fits": Case("sft", ("max_prompt_tokens = 2", "raise it"), "--max_prompt_tokens 2"),
    "longer than the context, ppo": Case(
        "ppo", ("context is 256", "lower max_prompt_tokens or"), "--max_completion_tokens 255"
    ),
    "longer than the context, sample": Case(
        "sample", ("context is 256", "lower max_prompt_tokens or"), "--max_completion_tokens 255"
    ),
    "longer than the context, sft": Case(
        "sft",
        ("the longest demonstration", "context is 256", "lower max_prompt"),
        "--max_prompt_tokens 900",
        demos(lines({"prompt": "film " * 300, "completion": "b"})),
    ),
    "all held out": Case("sft", ("held out", "lower held_out = 0.999"), "--held_out 0.999"),
    "a conversation without template": Case(
        "ppo",
        ("conversation", "no chat template", "give prompts as plain text"),
        files={"prompts.jsonl": lines({"prompt": [{"role": "user", "content": "a"}]})},
    ),
    # ---- models
    "no model": Case("sample", ("model folder ./nowhere does not exist",), "--model ./nowhere"),
    "the folder above the model": Case(
        "sample",
        ("no config.json", "did you mean above/model?"),
        "--model above",
        change=lambda at: shutil.copytree(at / "model", at / "above/model"),
    ),
    "weights cut in half": Case(
        "sample",
        ("trained cannot be loaded", "copy the folder again"),
        "--model trained",
        change=cut("trained/model.safetensors"),
    ),
    "settings cut in half": Case(
        "sample",
        ("trained cannot be loaded", "config.json", "copy the folder again"),
        "--model trained",
        change=cut("trained/config.json"),
    ),
    "contract cut in half": Case(
        "ppo",
        ("trained/contract.json cannot be read", "delete the file"),
        "--model trained",
        change=cut("trained/contract.json"),
    ),
    "another tokenizer": Case(
        "sample",
        ("trained", "not the one it was trained with", "put that tokenizer's files back"),
        "--model trained",
        change=other_tokenizer,
    ),
    "another template": Case(
        "ppo",
        ("contract.json of trained", "<assistant>", "<bot>", "put that chat template back"),
        "--model trained",
        change=other_template,
    ),
    "another tokenizer to compare with": Case("evaluate", ("different tokenizers", "--baseline"), "--baseline bytes"),
    "a policy for a reward": Case("ppo", ("model is no reward model", "`rlhf reward`"), "--reward model"),
}

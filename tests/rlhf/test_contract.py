"""The contract's file, and who may exchange token ids or hidden states with whom."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rlhf import contract as contracts
from rlhf.contract import Contract, check_same_template, digest
from rlhf.types import ContractError

MINE = Contract(
    tokenizer_hash="t0",
    template_hash="c0",
    template="{{ é }}",
    eos_token_ids=(1, 2),
    pad_token_id=0,
    adds_bos=True,
    max_prompt_tokens=8,
    max_completion_tokens=9,
    trunk_hash="w0",
    trunk_depth=2,
)


@pytest.mark.parametrize("contract", [MINE, replace(MINE, template=None, trunk_hash=None, trunk_depth=0)])
def test_round_trip(tmp_path: Path, contract: Contract) -> None:
    contract.save(tmp_path)
    assert contracts.load(tmp_path) == contract
    assert contracts.load(str(tmp_path)) == contract  # type: ignore[arg-type]


def test_a_foreign_model_has_none(tmp_path: Path) -> None:
    assert contracts.load(tmp_path) is None
    assert contracts.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", [f.name for f in fields(Contract) if not f.name.startswith("trunk")])
def test_a_file_that_lacks_a_field_is_refused_with_its_path(tmp_path: Path, name: str) -> None:
    MINE.save(tmp_path)
    file = tmp_path / "contract.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content[name]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ContractError, match=rf"contract\.json.*{name}"):
        contracts.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"unknown": 1, "eos_token_ids": []}', "\xff"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "contract.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ContractError, match=r"contract\.json cannot be read"):
        contracts.load(tmp_path)


def test_who_shares_what() -> None:
    assert MINE.shares_text_with(replace(MINE, template_hash="c1"))
    assert not MINE.shares_text_with(replace(MINE, tokenizer_hash="t1"))
    assert MINE.shares_trunk_with(replace(MINE, max_prompt_tokens=99))
    assert not MINE.shares_trunk_with(replace(MINE, trunk_hash="w1"))
    assert not MINE.shares_trunk_with(replace(MINE, tokenizer_hash="t1"))
    nothing = replace(MINE, trunk_hash=None, trunk_depth=0)
    assert not nothing.shares_trunk_with(nothing)


def test_another_template_on_the_same_tokenizer_is_refused_showing_both() -> None:
    theirs = replace(MINE, template_hash="c1", template="other template")
    names = {"mine_name": "the reward model", "theirs_name": "the policy"}
    with pytest.raises(ContractError, match="other template") as refused:
        check_same_template(MINE, theirs, **names)
    assert all(part in str(refused.value) for part in ("{{ é }}", "the reward model", "the policy"))
    check_same_template(MINE, replace(MINE, max_prompt_tokens=1), **names)
    check_same_template(MINE, replace(theirs, tokenizer_hash="t1"), **names)  # scored by text, each with its own


def test_digest_is_stable() -> None:
    assert digest("") == "e3b0c44298fc1c14"  # sha256 of nothing
    assert digest("a") != digest("b")

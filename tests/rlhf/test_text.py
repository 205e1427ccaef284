"""Text to ids and back, on tokenizers built here: with BOS and without, with and without templates and pads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import text
from rlhf.contract import Contract
from rlhf.types import ContractError, DataError
from tests.rlhf import tiny

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]

plain = tiny.tokenizer(pad="<pad>")
with_bos = tiny.tokenizer(pad="<pad>", bos="<s>")
printable = st.text(st.characters(codec="utf-8", exclude_characters="<\0"), max_size=20)


def contract(tokenizer: Any, **limits: int) -> Contract:
    given_ = {"max_prompt_tokens": 8, "max_completion_tokens": 8} | limits
    return text.contract_of(tokenizer, eos_token_ids=(), **given_)


# ---------------------------------------------------------------- prompts


@given(printable)
def test_a_plain_prompt_is_its_tokens_with_one_bos_where_there_is_one(prompt: str) -> None:
    ids = plain(prompt).input_ids
    assert text.encode_prompt(plain, prompt) == ids
    assert text.encode_prompt(with_bos, prompt) == [
        with_bos.bos_token_id,
        *with_bos(prompt, add_special_tokens=False).input_ids,
    ]
    assert text.encode_prompt(with_bos, prompt) == with_bos(prompt).input_ids


def test_a_bos_that_the_text_spells_out_is_not_doubled() -> None:
    assert text.encode_prompt(with_bos, "<s>Hi") == text.encode_prompt(with_bos, "Hi")


@pytest.mark.parametrize("template", [TURNS + ANSWER, "<s>" + TURNS + ANSWER, "{{ bos_token }}" + TURNS + ANSWER])
def test_a_conversation_has_exactly_one_bos_wherever_it_comes_from(template: str) -> None:
    tokenizer = tiny.tokenizer("<|user|>", "<|system|>", "<|assistant|>", pad="<pad>", bos="<s>")
    tokenizer.chat_template = template
    ids = text.encode_prompt(tokenizer, CHAT)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    rendered = "<|system|>Be kind.<eos><|user|>Hi<eos><|assistant|>"
    assert ids[1:] == tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.eos_token_id) == 2  # turns of the prompt end with EOS; the last token opens the answer
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_a_conversation_without_bos_tokenizer_has_none() -> None:
    tokenizer = tiny.tokenizer("<|user|>", "<|system|>", "<|assistant|>", pad="<pad>")
    tokenizer.chat_template = TURNS + ANSWER
    ids = text.encode_prompt(tokenizer, CHAT)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert all(isinstance(token, int) for token in ids)


def test_a_bos_that_the_tokenizer_does_not_add_by_itself_is_not_added() -> None:
    """GPT-2 names <|endoftext|> as BOS and EOS and adds neither."""
    tokenizer = tiny.tokenizer(pad="<pad>")
    tokenizer.bos_token = "<eos>"
    assert not text.adds_bos(tokenizer)
    assert text.encode_prompt(tokenizer, "Hi") == tokenizer("Hi").input_ids


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(ContractError, match="no chat template"):
        text.encode_prompt(plain, CHAT)


def test_prompt_and_completion_are_tokenised_apart() -> None:
    """Together " a" would be one token; a sampled completion never merges with its prompt."""
    tokenizer = tiny.tokenizer(pad="<pad>", merge=" a")
    joint = tokenizer("The film was a joy").input_ids
    apart = text.encode_prompt(tokenizer, "The film was ") + text.encode_completion(tokenizer, "a joy")
    assert tokenizer.convert_tokens_to_ids("Ġa") in joint
    assert apart == [*plain("The film was a joy").input_ids, tokenizer.eos_token_id] != [*joint, tokenizer.eos_token_id]


# ---------------------------------------------------------------- many prompts


def test_prompts_that_do_not_fit_are_left_out_and_never_cut() -> None:
    ids, kept = text.encode_prompts(with_bos, ["abc", "abcd", "ab"], max_tokens=4)
    assert kept == [0, 2]
    assert ids == [with_bos("abc").input_ids, with_bos("ab").input_ids]
    assert text.encode_prompts(plain, [], max_tokens=4) == ([], [])


def test_when_no_prompt_fits_the_error_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"max_prompt_tokens = 3 \(the shortest has 4\)"):
        text.encode_prompts(plain, ["abcde", "abcd"], max_tokens=3)


def test_an_empty_prompt_needs_a_bos() -> None:
    assert text.encode_prompts(with_bos, [""], max_tokens=4) == ([[with_bos.bos_token_id]], [0])
    with pytest.raises(DataError, match="prompt 2 has no tokens"):
        text.encode_prompts(plain, ["a", ""], max_tokens=4)


# ---------------------------------------------------------------- completions


@given(printable, st.sampled_from([plain, with_bos]))
def test_completions_end_with_eos_hold_no_bos_and_come_back_unchanged(completion: str, tokenizer: Any) -> None:
    ids = text.encode_completion(tokenizer, completion)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[:-1] == tokenizer(completion, add_special_tokens=False).input_ids
    assert tokenizer.bos_token_id not in ids
    assert text.decode_completion(tokenizer, ids) == completion
    assert text.decode_completion(tokenizer, [*ids, tokenizer.pad_token_id, tokenizer.pad_token_id]) == completion


@given(printable, st.integers(1, 6))
def test_a_completion_that_is_too_long_loses_its_end_but_not_its_eos(completion: str, limit: int) -> None:
    whole, cut = text.encode_completion(plain, completion), text.encode_completion(plain, completion, max_tokens=limit)
    assert len(cut) == min(len(whole), limit)
    assert cut == (whole if len(whole) <= limit else [*whole[: limit - 1], plain.eos_token_id])


def test_spaces_before_punctuation_survive_decoding() -> None:
    assert text.decode_completion(plain, text.encode_completion(plain, "it is n't , no .")) == "it is n't , no ."


def test_a_nul_that_a_model_writes_is_seen_as_what_it_is() -> None:
    """PostgreSQL would refuse the whole round of samples for it."""
    assert text.decode_completion(plain, [*plain("a\0b").input_ids, plain.eos_token_id]) == "a\ufffdb"


# ---------------------------------------------------------------- pad


@pytest.mark.parametrize(
    ("make", "eos_ids", "pad", "added"),
    [
        (lambda: tiny.tokenizer(pad="<pad>"), (), "<pad>", False),
        (lambda: tiny.tokenizer("<|endoftext|>", pad="<eos>"), (), "<|endoftext|>", False),  # SmolLM2
        (lambda: tiny.tokenizer("<pad>", "<unk>"), (), "<pad>", False),
        (lambda: tiny.tokenizer(), (), "<|pad|>", True),  # GPT-2
        (lambda: tiny.tokenizer(eos="<|endoftext|>"), (), "<|pad|>", True),
        (lambda: tiny.tokenizer(pad="<|endoftext|>"), ("<|endoftext|>",), "<|pad|>", True),  # Qwen's generation config
        (lambda: tiny.tokenizer("<unk>", pad="<|endoftext|>"), ("<|endoftext|>",), "<unk>", False),
    ],
)
def test_the_pad_is_never_an_eos(make: Callable[[], Any], eos_ids: tuple[str, ...], pad: str, added: bool) -> None:
    tokenizer = make()
    before = len(tokenizer)
    text.ensure_pad(tokenizer, tokenizer.convert_tokens_to_ids(list(eos_ids)))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(eos_ids))}
    assert len(tokenizer) == before + added
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id) == pad


# ---------------------------------------------------------------- contract


def test_the_contract_says_what_the_tokenizer_does() -> None:
    tokenizer = tiny.tokenizer("<|im_end|>", pad="<pad>", bos="<s>")
    found = text.contract_of(
        tokenizer,
        eos_token_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")],
        max_prompt_tokens=5,
        max_completion_tokens=6,
    )
    ids = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    assert found.eos_token_ids == tuple(sorted(ids))
    assert (found.pad_token_id, found.adds_bos) == (tokenizer.pad_token_id, True)
    assert (found.max_prompt_tokens, found.max_completion_tokens) == (5, 6)
    assert (found.trunk_hash, found.trunk_depth, found.template) == (None, 0, None)


def test_the_hash_knows_nothing_of_padding_truncation_or_use(tmp_path) -> None:
    tokenizer = tiny.tokenizer(pad="<pad>", bos="<s>")
    tokenizer.chat_template = TURNS
    before = contract(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side = "right"
    assert contract(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert contract(reloaded) == before
    reloaded.save_pretrained(tmp_path / "again")
    assert contract(AutoTokenizer.from_pretrained(tmp_path / "again")) == before


def test_the_hash_changes_with_vocabulary_bos_rule_and_template() -> None:
    one = tiny.tokenizer(pad="<pad>")
    same = tiny.tokenizer(pad="<pad>")
    assert contract(one) == contract(same)
    assert contract(tiny.tokenizer("<x>", pad="<pad>")).tokenizer_hash != contract(one).tokenizer_hash
    assert contract(tiny.tokenizer(pad="<pad>", bos="<s>")).tokenizer_hash != contract(one).tokenizer_hash
    assert contract(tiny.tokenizer(pad="<pad>", merge="ab")).tokenizer_hash != contract(one).tokenizer_hash
    same.chat_template = TURNS
    assert contract(same).template_hash != contract(one).template_hash
    assert contract(same).tokenizer_hash == contract(one).tokenizer_hash
    assert contract(same).template == TURNS
    assert replace(contract(one), max_prompt_tokens=9) == contract(one, max_prompt_tokens=9)


def test_a_tokenizer_without_backend_is_hashed_by_its_vocabulary() -> None:
    class Slow:
        chat_template, eos_token_id, pad_token_id, bos_token_id = None, 1, 0, None

        def __init__(self, *tokens: str):
            self.tokens = tokens

        def get_vocab(self) -> dict[str, int]:
            return {token: i for i, token in enumerate(self.tokens)}

    assert contract(Slow("a", "b")) == contract(Slow("a", "b"))
    assert contract(Slow("a", "b")).tokenizer_hash != contract(Slow("b", "a")).tokenizer_hash

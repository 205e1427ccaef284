"""Text to token ids and back: chat template, BOS, the boundary between prompt and completion, EOS, truncation.

The only module that tokenises. One rule everywhere: prompt and completion are tokenised apart and their ids joined, so
that training reads exactly the boundary that sampling produces; a finished completion ends with EOS, which is learned.
Token ids are never derived from masks, nor masks from token ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlhf.contract import Contract, digest
from rlhf.types import ContractError, DataError, Prompt

PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt, ready for a completion to follow: exactly one BOS where the tokenizer uses one, no EOS after it.

    The BOS is there whether the text or the chat template spells it out or leaves it to the tokenizer.
    Raises ContractError for a conversation on a tokenizer without chat template.
    """
    if isinstance(prompt, str):
        return _with_bos(tokenizer, _plain(tokenizer, prompt))
    if not tokenizer.chat_template:
        raise ContractError(
            "the prompt is a conversation, but this model's tokenizer has no chat template: use a model that has one, "
            "or give prompts as plain text"
        )
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return _with_bos(tokenizer, _plain(tokenizer, rendered))


def encode_completion(tokenizer: Any, completion: str, *, max_tokens: int | None = None) -> list[int]:
    """Ids of a finished completion: its text, cut to leave room, and EOS. At most `max_tokens` ids."""
    ids = _plain(tokenizer, completion)
    if max_tokens is not None:
        ids = ids[: max_tokens - 1]
    return [*ids, tokenizer.eos_token_id]


def decode_completion(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of a sampled completion, without EOS, padding and other special tokens.

    A model may write NUL, which PostgreSQL cannot keep and no page shows: for whoever reads the text it is U+FFFD.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.replace("\0", "\ufffd")


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], *, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Ids of the prompts that fit into `max_tokens`, and their indices. A prompt is never cut: that would hide its end.

    Raises DataError when none fits, or when a prompt has no token at all.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    empty = next((i for i, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise DataError(f"prompt {empty + 1} has no tokens: a completion needs something to continue")
    kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_tokens]
    if encoded and not kept:
        shortest = min(map(len, encoded))
        raise DataError(
            f"every prompt is longer than max_prompt_tokens = {max_tokens} (the shortest has {shortest}): raise it"
        )
    return [encoded[i] for i in kept], kept


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def ensure_pad(tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
    """Give the tokenizer a pad token that is no EOS, adding one to the vocabulary only where nothing fits."""
    taken = {tokenizer.eos_token_id, *eos_token_ids}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        vocabulary = tokenizer.get_vocab()
        fitting = [token for token in PAD_CANDIDATES if token in vocabulary and vocabulary[token] not in taken]
        if fitting:
            tokenizer.pad_token = fitting[0]
        else:
            tokenizer.add_special_tokens({"pad_token": PAD_CANDIDATES[0]})
    tokenizer.padding_side = "left"


def contract_of(
    tokenizer: Any, *, eos_token_ids: Sequence[int], max_prompt_tokens: int, max_completion_tokens: int
) -> Contract:
    """What this tokenizer makes of text; the trunk's part is filled in by whoever holds the weights."""
    template = tokenizer.chat_template
    return Contract(
        tokenizer_hash=digest(_canonical(tokenizer)),
        template_hash=digest(json.dumps(template, sort_keys=True)),
        template=template if isinstance(template, str) or template is None else json.dumps(template),
        eos_token_ids=tuple(sorted({tokenizer.eos_token_id, *eos_token_ids})),
        pad_token_id=tokenizer.pad_token_id,
        adds_bos=adds_bos(tokenizer),
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
    )


def _plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos, *ids] if adds_bos(tokenizer) and ids[:1] != [bos] else ids


def _canonical(tokenizer: Any) -> str:
    """What decides the ids of a text: the tokenizer's own description, without its padding and truncation state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    description = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return json.dumps(description, sort_keys=True)

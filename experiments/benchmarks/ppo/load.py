"""What both sides are given: one policy, one reward model and the same prompts, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

REWARD_SEED = 0


def prepare(folder: Path, *, model: str, load: str, count: int, prompt_tokens: int) -> None:
    """Write `policy/`, `reward/` and `prompts.json` (texts and their ids, none longer than the limit).

    `fixed`: every prompt has exactly `prompt_tokens` tokens of a review. `real`: questions and beginnings of reviews.
    """
    import torch

    from reward_models.model import set_calibration
    from rlhf import models

    tokenizer = models.load_tokenizer(model)
    policy = models.load_policy(model, tokenizer)
    contract = models.model_contract(policy, tokenizer, max_prompt_tokens=prompt_tokens, max_completion_tokens=1024)
    models.save_model(policy, tokenizer, folder / "policy", contract=contract)
    classifier = models.load_classifier(str(folder / "policy"), tokenizer, seed=REWARD_SEED)
    set_calibration(classifier, torch.tensor([-1.0, 1.0]))
    models.save_model(classifier, tokenizer, folder / "reward", contract=contract)
    texts = _fixed(tokenizer, prompt_tokens) if load == "fixed" else _real(tokenizer, prompt_tokens)
    rows = [{"prompt": text, "ids": ids} for text, ids in texts[:count]]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")


def _reviews() -> list[str]:
    from experiments.sentiment.data import prompts

    return [str(row["prompt"]) for row in prompts()]


def _fixed(tokenizer, tokens: int) -> list[tuple[str, list[int]]]:
    """Pieces of running text that are tokenised into exactly so many tokens."""
    running = " ".join(_reviews())
    ids = tokenizer(running, add_special_tokens=False).input_ids
    found: list[tuple[str, list[int]]] = []
    for start in range(0, len(ids) - tokens, tokens):
        text = tokenizer.decode(ids[start : start + tokens])
        again = tokenizer(text, add_special_tokens=False).input_ids
        if len(again) == tokens:
            found.append((text, again))
    return found


QUESTIONS = (
    "What is the capital of {}?",
    "Name three things that people in {} like to eat.",
    "I have one day in {}. What should I see, and in which order?",
    "Write two sentences about the weather in {}.",
    "Is {} larger than Italy?",
    "Explain to a child where {} lies.",
    "Write a short poem about the rivers of {}.",
    "What did people in {} do for a living a hundred years ago?",
    "Give me the names of two writers from {} and one book of each.",
)
PLACES = (
    "France",
    "Peru",
    "Kenya",
    "Japan",
    "Norway",
    "Egypt",
    "India",
    "Chile",
    "Canada",
    "Portugal",
    "Vietnam",
    "Iran",
)


def _real(tokenizer, longest: int) -> list[tuple[str, list[int]]]:
    """Questions through the chat template and beginnings of reviews, by turns, as plain text."""
    asked = [question.format(place) for place in PLACES for question in QUESTIONS]
    chat = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]
    mixed = [text for pair in zip(chat, _reviews(), strict=False) for text in pair]
    encoded = [(text, tokenizer(text, add_special_tokens=False).input_ids) for text in mixed]
    return [(text, ids) for text, ids in encoded if len(ids) <= longest]

"""What the rows of a data set mean: prompts, demonstrations and preferences, checked and split by prompt.

The formats are TRL's data-set types; rankings, in the form of the label store, come from `rlhf.rankings`. Nothing is
guessed: a column under another name is mapped by a flag, and a row that cannot be used is named by file and line.
Nothing here tokenises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from rlhf.contract import digest
from rlhf.rankings import (
    BadRow,
    RankingFile,
    ranking_from_json,
    ranking_to_json,
    read_rankings,
    write_rankings,
)
from rlhf.sources import check_messages, check_text, read_rows, resolve
from rlhf.types import ConfigError, DataError, Demonstration, Message, Prompt, Ranking

__all__ = [
    "BadRow",
    "RankingFile",
    "distinct",
    "is_held_out",
    "prompt_key",
    "ranking_from_json",
    "ranking_to_json",
    "read_demonstrations",
    "read_preferences",
    "read_prompts",
    "read_rankings",
    "read_rows",
    "resolve",
    "split",
    "write_rankings",
]

T = TypeVar("T")

Columns = Mapping[str, str]
"""Our column name -> the user's."""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "input", "context", "post", "document", "text"),
    "completion": ("answer", "response", "output", "reply", "summary", "target"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "turns"),
    "chosen": ("preferred", "better", "winner", "accepted", "good"),
    "rejected": ("dispreferred", "worse", "loser", "bad"),
    "completions": ("responses", "answers", "candidates", "outputs", "generations"),
    "ranks": ("rank", "ranking", "order"),
    "annotator": ("worker", "rater", "labeler", "user"),
}
"""What data sets in the wild call our columns; used to advise, never to map."""


def read_prompts(source: str | Path, columns: Columns | None = None) -> list[Prompt]:
    """The prompts of a data set: column `prompt`, or `messages` without an assistant's last turn. Raises DataError."""
    return _read(source, columns, lambda row: row.prompt() if row.states("prompt") else row.conversation()[0])


def read_demonstrations(source: str | Path, columns: Columns | None = None) -> list[Demonstration]:
    """Prompts with the completion wanted: `prompt` and `completion`, or `messages` that end with the assistant's turn.

    Raises DataError naming file and line.
    """
    return _read(source, columns, _demonstration)


def read_preferences(source: str | Path, columns: Columns | None = None) -> list[Ranking]:
    """Pairs as rankings of two: `prompt`, `chosen`, `rejected`; two whole conversations may share the prompt instead.

    A chosen text that equals the rejected one says nothing and becomes a tie. Raises DataError naming file and line.
    """
    return _read(source, columns, _preference)


def _read(source: str | Path, columns: Columns | None, make: Callable[[_Row], T]) -> list[T]:
    _check_names(columns or {})
    items = []
    for where, fields in read_rows(source):
        try:
            items.append(make(_Row(fields, columns or {})))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if not items:
        raise DataError(f"{source} holds no rows: give one a line, with the columns that the README names")
    return items


def _check_names(columns: Columns) -> None:
    for name in columns:
        if name not in OTHER_NAMES:
            near = get_close_matches(name, OTHER_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(OTHER_NAMES)}"
            raise ConfigError(f"columns.{name}: there is no column {name!r} to map{hint}")


@dataclass(frozen=True)
class _Row:
    """A row with our names for its columns. Every reader raises DataError naming the column."""

    fields: Mapping[str, Any]
    columns: Columns

    def name(self, ours: str) -> str:
        return self.columns.get(ours, ours)

    def lacks(self, ours: str) -> bool:
        return self.fields.get(self.name(ours)) is None

    def states(self, *ours: str) -> bool:
        """Whether to read these columns rather than `messages`: they are there, or messages are not."""
        return self.lacks("messages") or not any(self.lacks(name) for name in ours)

    def value(self, ours: str) -> Any:
        if self.name(ours) in self.fields:
            return self.fields[self.name(ours)]
        near = next((other for other in OTHER_NAMES[ours] if other in self.fields), None)
        hint = f"If {near!r} is the {ours}, pass --columns.{ours} {near}" if near else f"Name it: --columns.{ours} NAME"
        found = ", ".join(map(str, self.fields)) or "none"
        if len(self.fields) == 1 and any(sign in found for sign in ";\t"):
            hint = "Separate the columns by commas"
        raise DataError(f"there is no column {self.name(ours)!r}. Columns found: {found}. {hint}")

    def text(self, ours: str) -> str:
        return check_text(self.value(ours), self.name(ours))

    def messages(self, ours: str) -> list[Message]:
        return check_messages(self.value(ours), self.name(ours))

    def prompt(self) -> Prompt:
        return self.messages("prompt") if isinstance(self.value("prompt"), list) else self.text("prompt")

    def completion(self, ours: str) -> str:
        """A text, or a conversation of one assistant's turn as TRL writes it."""
        if not isinstance(self.value(ours), list):
            return self.text(ours)
        turns = self.messages(ours)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DataError(f"{self.name(ours)} must be one turn of the assistant, not {len(turns)} turns")
        return turns[0]["content"]

    def conversation(self) -> tuple[list[Message], str | None]:
        """(the turns before the assistant's last, that last turn); None where another role speaks last."""
        turns = self.messages("messages")
        if turns[-1]["role"] != "assistant":
            return turns, None
        if len(turns) == 1:
            raise DataError(f"{self.name('messages')} holds the assistant's turn only, and no prompt")
        return turns[:-1], turns[-1]["content"]


def _demonstration(row: _Row) -> Demonstration:
    if row.states("prompt", "completion"):
        return Demonstration(row.prompt(), row.completion("completion"))
    prompt, completion = row.conversation()
    if completion is None:
        raise DataError(f"{row.name('messages')} does not end with the assistant's turn")
    return Demonstration(prompt, completion)


def _preference(row: _Row) -> Ranking:
    texts = [row.value(name) for name in ("chosen", "rejected")]
    if all(isinstance(text, list) and len(text) > 1 for text in texts):
        prompt, pair = _shared_prompt(row)
    else:
        prompt, pair = row.prompt(), (row.completion("chosen"), row.completion("rejected"))
    annotator = "preferences" if row.lacks("annotator") else row.text("annotator")
    return Ranking(prompt, pair, (1, 1) if pair[0] == pair[1] else (1, 2), annotator)


def _shared_prompt(row: _Row) -> tuple[Prompt, tuple[str, str]]:
    """The turns that two conversations share, and the one assistant's turn in which they part."""
    chosen, rejected = row.messages("chosen"), row.messages("rejected")
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))]
    rest = (chosen[len(shared) :], rejected[len(shared) :])
    if not shared or any(len(turns) != 1 or turns[0]["role"] != "assistant" for turns in rest):
        raise DataError(
            f"chosen and rejected must be the same conversation up to one last turn of the assistant; "
            f"they share {len(shared)} turns and then have {len(rest[0])} and {len(rest[1])}"
        )
    return shared, (rest[0][0]["content"], rest[1][0]["content"])


# ---------------------------------------------------------------------------------------------------------- split


def prompt_key(prompt: Prompt) -> str:
    """A stable fingerprint of a prompt; a plain text and a conversation never share one."""
    return digest(json.dumps(prompt, sort_keys=True, ensure_ascii=False))


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether a prompt is kept out of training: decided by its hash, so that every stage decides the same.

    A conversation of one turn counts as its text, so that a data set in both forms cannot leak.
    """
    text = prompt[0]["content"] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    return int(prompt_key(text), 16) < share * 2**64


def split(items: Iterable[T], share: float, key: Callable[[T], Prompt]) -> tuple[list[T], list[T]]:
    """(train, held out) by prompt; `key` gives an item's prompt."""
    train: list[T] = []
    held_out: list[T] = []
    for item in items:
        (held_out if is_held_out(key(item), share) else train).append(item)
    return train, held_out


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without repeats, in their first order."""
    return list({prompt_key(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]

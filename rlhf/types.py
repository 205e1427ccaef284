"""The vocabulary that every package shares: prompts, completions, rankings, rewards. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol, TypedDict, runtime_checkable


class UserError(Exception):
    """Something the user can mend. The message says what value, where, why it is impossible and what to change.

    The command line prints it as one line and exits with status 2; it never shows a traceback for it.
    """


class DataError(UserError, ValueError):
    """A file, row or column that cannot be used."""


class StoreError(DataError):
    """A label store that cannot be reached, read or written as things are; the same may work later."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be used."""


class ContractError(UserError, ValueError):
    """Two parts (policy, reward model, page) that do not speak the same text."""


class Message(TypedDict):
    """One turn of a conversation, as in TRL's conversational data sets."""

    role: str
    content: str


Prompt = str | list[Message]
"""What a completion continues: a plain text, or the turns of a conversation so far."""


def prompt_text(prompt: Prompt) -> str:
    """The prompt as a person reads it (not as a model does: that is `rlhf.text`)."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the completion that a person would want."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and how it was sampled. `settings` holds temperature, token limits and the like."""

    text: str
    model: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    """Whether the model ended by itself (EOS) rather than at the token limit."""


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt; `outcome` is 1 when `first` is better, 0 when `second` is, 0.5 for a tie."""

    prompt: Prompt
    first: str
    second: str
    outcome: float

    def swap(self) -> Comparison:
        """The same judgement read from the other side."""
        return Comparison(self.prompt, self.second, self.first, 1.0 - self.outcome)


@dataclass(frozen=True)
class Ranking:
    """One annotator's order of K completions of one prompt.

    `ranks[i]` belongs to `completions[i]`: 1 is best, equal numbers are ties, None is "not ranked".
    `presented_order` lists the indices of `completions` in the order in which the page showed them.
    Raises DataError when the parts do not fit together.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int | None, ...]
    annotator: str
    presented_order: tuple[int, ...] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    rationale: str | None = None
    seconds: float | None = None
    round: int = 0
    guideline_version: int = 1
    created_at: str | None = None

    def __post_init__(self) -> None:
        count = len(self.completions)
        if count < 2:
            raise DataError(f"a ranking needs at least 2 completions, this one has {count}")
        if len(self.ranks) != count:
            raise DataError(f"{len(self.ranks)} ranks for {count} completions: give one rank (or null) for each")
        for rank in self.ranks:
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= count):
                raise DataError(f"rank {rank!r} is not an integer from 1 to {count}: 1 is best, null is not ranked")
        order = self.presented_order
        if order is not None and not (all(type(i) is int for i in order) and sorted(order) == list(range(count))):
            raise DataError(f"presented_order {list(order)} is not an order of the indices 0 to {count - 1}")

    @property
    def levels(self) -> list[list[int]]:
        """Indices of the ranked completions, best level first; tied completions share a level."""
        used = sorted({rank for rank in self.ranks if rank is not None})
        return [[i for i, rank in enumerate(self.ranks) if rank == level] for level in used]

    def comparisons(self) -> Iterator[Comparison]:
        """All pairs of ranked completions, ties included (outcome 0.5)."""
        ranked = [(i, rank) for i, rank in enumerate(self.ranks) if rank is not None]
        for (i, first), (j, second) in combinations(ranked, 2):
            outcome = 0.5 if first == second else float(first < second)
            yield Comparison(self.prompt, self.completions[i], self.completions[j], outcome)


@runtime_checkable
class RewardFn(Protocol):
    """Anything that scores completions: a trained reward model, a classifier, a rule, any Python callable."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Sequence[float]:
        """One finite score per completion, in the order given."""
        ...


@runtime_checkable
class SharesWeights(RewardFn, Protocol):
    """A reward model that can do with less memory beside the reference."""

    def share_weights(self, other: Any) -> None:
        """Hold weights that a frozen model beside it has, too, only once. Scores do not change."""
        ...


@runtime_checkable
class TrunkReward(RewardFn, Protocol):
    """A reward model that may stand on the policy's own frozen trunk: the rollout can hand it that trunk's states."""

    def on_trunk(self, policy: Any) -> bool:
        """Whether its lower layers are the frozen trunk of the policy with this contract, and read the same tokens."""
        ...

    def rows(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        """The token ids that it reads, one row for each completion; the last is EOS."""
        ...

    def score_hidden(self, hidden: Any, lengths: Any) -> Any:
        """Scores (B,) from trunk states (B, L, D) of rows of `lengths` (B,) tokens, padded on the right.

        Equal to scoring the same rows by text.
        """
        ...

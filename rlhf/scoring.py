"""What a reward says of completions: checked, and read from the policy's own trunk where it stands on that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.generation import Generated
from rlhf.sequences import Sequences
from rlhf.sources import told
from rlhf.types import Prompt, RewardFn, TrunkReward, UserError


def checked_scores(reward: RewardFn, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """The scores, after making sure that there is one finite number per completion; raises UserError otherwise."""
    name = f"the reward {_name(reward)}"
    count = len(completions)
    try:
        returned = reward(list(prompts), list(completions))
    except UserError:
        raise
    except Exception as error:  # the function is the user's
        advice = "it is called as reward(prompts, completions) and returns one number for each completion"
        raise UserError(f"{name} failed on {count} completions{told(error)}: {advice}") from error
    try:
        found = None if isinstance(returned, str | bytes | Mapping) else list(returned)
    except TypeError:  # not iterable
        found = None
    if found is None:
        raise UserError(
            f"{name} returned a {type(returned).__name__} for {count} completions: return a list of numbers"
        )
    if len(found) != count:
        raise UserError(f"{name} returned {len(found)} scores for {count} completions: return one for each, in order")
    return [_score(value, completion, name) for value, completion in zip(found, completions, strict=True)]


def _score(value: Any, completion: str, name: str) -> float:
    of = f"{name} returned {repr(value)[:60]} for the completion {completion[:80]!r}"
    try:
        score = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{of}: return a number") from error
    if not math.isfinite(score):
        raise UserError(f"{of}: scores must be finite numbers")
    return score


def _name(reward: RewardFn) -> str:
    """`module:function`, as the user wrote it; the class of anything that is no function."""
    function = getattr(reward, "__qualname__", None)
    return f"{reward.__module__}:{function}" if function else type(reward).__name__


@dataclass(frozen=True)
class Read:
    """The rows of a rollout as a reward on the policy's trunk reads them: with EOS, whether it was sampled or not."""

    sequences: Sequences
    """One column wider than what is read: `Sequences.model_inputs` leaves the last one away."""
    same: list[bool]
    """Whether the text is tokenised into what was sampled. It need not be; such a row stays as it was sampled."""

    @staticmethod
    def of(
        reward: TrunkReward,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        completions: Sequence[str],
        sampled: Sequence[Generated],
    ) -> Read:
        """Compare what the reward makes of the texts with the tokens that they came from."""
        rows = reward.rows(prompts, completions)
        own = [
            [*ids, *(each.ids[:-1] if each.finished else each.ids)]
            for ids, each in zip(prompt_ids, sampled, strict=True)
        ]
        same = [row[:-1] == ids for row, ids in zip(rows, own, strict=True)]
        read = [
            row[len(ids) :] if alike else each.ids
            for row, ids, each, alike in zip(rows, prompt_ids, sampled, same, strict=True)
        ]
        return Read(Sequences.from_lists(prompt_ids, [[*ids, UNREAD] for ids in read], pad=UNREAD), same)

    def scored_by(self, reward: TrunkReward, trunk_states: Tensor) -> RewardFn:
        """The same reward: by the trunk's states of `sequences` where it reads what was sampled, by text elsewhere."""
        starts = self.sequences.prompt_ids.shape[1] - self.sequences.prompt_lengths
        ends = self.sequences.prompt_ids.shape[1] + self.sequences.completion_lengths - 1
        places = zip(trunk_states, starts.tolist(), ends.tolist(), strict=True)
        states = [row[start:end] for row, start, end in places]

        def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
            scores = [0.0] * len(completions)
            by_states = [i for i, alike in enumerate(self.same) if alike]
            if by_states:
                hidden = [states[i] for i in by_states]
                found = reward.score_hidden(
                    pad_sequence(hidden, batch_first=True), torch.tensor(list(map(len, hidden)))
                )
                for i, value in zip(by_states, found.tolist(), strict=True):
                    scores[i] = value
            by_text = [i for i, alike in enumerate(self.same) if not alike]
            if by_text:
                found = reward([prompts[i] for i in by_text], [completions[i] for i in by_text])
                for i, value in zip(by_text, found, strict=True):
                    scores[i] = value
            return scores

        return score


UNREAD = 0
"""Fills rows up. Masks come from the lengths, so it may be any token."""

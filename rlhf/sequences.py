"""A batch of prompts with their completions, as token ids and lengths.

Shapes: B sequences, P prompt tokens (left-padded), T completion tokens (right-padded). Masks come from the lengths and
never from `ids != pad`, so a pad token that also occurs in the text does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions. The last valid token of a finished completion is its EOS."""

    prompt_ids: Tensor
    """(B, P) integers, left-padded."""
    prompt_lengths: Tensor
    """(B,) integers, at least 1."""
    completion_ids: Tensor
    """(B, T) integers, right-padded."""
    completion_lengths: Tensor
    """(B,) integers, at least 1."""
    trunk_states: Tensor | None = field(default=None, kw_only=True)
    """(B, P + T - 1, D) what the model's frozen lower layers make of `model_inputs()`, where it has been computed."""

    @staticmethod
    def from_lists(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, pad: int) -> Sequences:
        """Pad lists of token ids into one batch. Raises ValueError for a row without tokens."""
        for name, rows in (("prompt", prompts), ("completion", completions)):
            empty = [i for i, row in enumerate(rows) if not len(row)]
            if empty:
                raise ValueError(
                    f"{name} {empty[0]} has no tokens: every prompt and every completion needs at least one"
                )
        return Sequences(
            prompt_ids=pad_rows(prompts, pad=pad, side="left"),
            prompt_lengths=torch.tensor([len(row) for row in prompts], dtype=torch.long),
            completion_ids=pad_rows(completions, pad=pad, side="right"),
            completion_lengths=torch.tensor([len(row) for row in completions], dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def width(self) -> int:
        """P + T."""
        return self.prompt_ids.shape[1] + self.completion_ids.shape[1]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.prompt_ids.device

    @property
    def completion_mask(self) -> Tensor:
        """(B, T) True on the completion's tokens, EOS included."""
        return length_mask(self.completion_lengths, self.completion_ids.shape[1])

    def model_inputs(self) -> dict[str, Tensor]:
        """What a causal model is fed: all tokens but the last, whose T last positions predict the completion.

        `input_ids`, `attention_mask` and `position_ids`, each (B, P + T - 1).
        """
        prompt_mask = length_mask(self.prompt_lengths, self.prompt_ids.shape[1]).flip(1)
        mask = torch.cat([prompt_mask, self.completion_mask], dim=1)[:, :-1].long()
        ids = torch.cat([self.prompt_ids, self.completion_ids], dim=1)[:, :-1]
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def select(self, rows: Tensor) -> Self:
        """These rows of every tensor, without the padding that none of them needs."""
        prompt = int(self.prompt_lengths[rows].max())
        completion = int(self.completion_lengths[rows].max())
        width = self.completion_ids.shape[1]
        left = self.prompt_ids.shape[1] - prompt

        def pick(name: str, value: Tensor) -> Tensor:
            if name == "prompt_ids":
                return value[rows, left:]
            if name == "trunk_states":
                return value[rows, left : left + prompt + completion - 1]
            is_per_token = value.ndim >= 2 and value.shape[1] == width
            return value[rows, :completion] if is_per_token else value[rows]

        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: pick(name, v) for name, v in tensors.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device) -> Self:
        """The same batch with every tensor on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in tensors.items() if isinstance(v, Tensor)})


def pad_rows(rows: Sequence[Sequence[int]], *, pad: int, side: Literal["left", "right"]) -> Tensor:
    """(B, longest) integers from ragged rows."""
    width = max((len(row) for row in rows), default=0)
    padded = [
        [pad] * (width - len(row)) + [*row] if side == "left" else [*row] + [pad] * (width - len(row)) for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) True in the first `lengths[b]` places of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]

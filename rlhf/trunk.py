"""The frozen lower layers of a model, run once for everyone who reads their output.

With `trainable: {last_layers: n}` or `head`, the layers below the first trained one (the trunk) compute the same for
policy, reference and value, before an update and in each of its epochs. So their hidden states are computed once and
put in the trunk's place. The model stays whole: its frozen layers are passed through, and masks, positions and whatever
else it derives from its input stay its own. That is exact, and proven for each model before it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf.models import autocast, frozen_depth, layers_of
from rlhf.progress import OnProgress, ignore, say
from rlhf.sequences import length_mask, pad_rows

EXACT = 1e-5
"""Largest difference that handing on the trunk's states may make to hidden states of unit size, in fp32."""


@dataclass(frozen=True)
class Trunk:
    """The lowest `depth` layers of `model`."""

    model: Any
    depth: int
    dtype: torch.dtype
    """What the trunk computes in; its states come in what the layers above would have been given."""
    outputs: int
    """How many things a layer returns, the hidden states first; 0 for the hidden states alone."""

    @staticmethod
    def of(model: Any, dtype: torch.dtype, *, depth: int | None = None) -> Trunk | None:
        """The trunk of a model; None where the lowest layer is trained, or where handing its states on is not exact.

        It is as deep as the model's lowest trained layer allows, or `depth` where another model's trunk is meant.
        """
        depth = frozen_depth(model) if depth is None else depth
        if depth == 0:
            return None
        trunk = Trunk(model, depth, dtype, _outputs(model))
        gap = trunk.gap()
        if gap <= EXACT:
            return trunk
        say(
            f"the {depth} frozen layers of {type(model).__name__} run anew each time, which is right but slow: with "
            f"their output put in for them, the layers above differ by {gap:.1e}"
        )
        return None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, L, D) what the frozen layers make of a model's inputs."""
        reached: list[Tensor] = []

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            reached.append(output[0] if self.outputs else output)
            raise _Reached

        hook = layers_of(self.model)[1][self.depth - 1].register_forward_hook(leave)
        try:
            with autocast(inputs["input_ids"].device, self.dtype):
                self.model.base_model(**inputs, use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        return reached[0]

    @contextmanager
    def handing_on(self, model: Any, states: Tensor | None) -> Iterator[None]:
        """Inside the block the lowest layers of `model` compute nothing and hand `states` on; None changes nothing.

        `model` may be a copy of this trunk's model: with other upper layers, or with a score in place of its LM head.
        """
        below = list(layers_of(model)[1][: self.depth]) if states is not None else []
        output = (states, *[None] * (self.outputs - 1)) if self.outputs else states
        for layer in below:
            layer.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for layer in below:
                del layer.forward  # the class's own shows again

    @torch.no_grad()
    def gap(self) -> float:
        """Largest difference that handing the states on makes to the last hidden states, on padded rows.

        In fp32, unless the model holds weights in less (`models.only_read`).
        """
        inputs = padded_example(self.model)
        dtype = torch.bfloat16 if is_mixed(self.model) else torch.float32
        states = Trunk(self.model, self.depth, dtype, self.outputs).states(inputs)
        with autocast(states.device, dtype):
            sound = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            with self.handing_on(self.model, states):
                handed = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return float((sound - handed)[inputs["attention_mask"].bool()].abs().max())


class _Reached(Exception):
    """Ends a forward pass above the trunk."""


def _outputs(model: Any) -> int:
    seen: list[Any] = []
    hook = layers_of(model)[1][0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad(), autocast(model.device, torch.bfloat16 if is_mixed(model) else torch.float32):
        model.base_model(**padded_example(model), use_cache=False)
    hook.remove()
    return 0 if isinstance(seen[0], Tensor) else len(seen[0])


def is_mixed(model: Any) -> bool:
    """Whether the model holds weights in bf16."""
    return any(weight.dtype == torch.bfloat16 for weight in model.parameters())


def padded_example(model: Any) -> dict[str, Tensor]:
    """Two rows, one padded on the left and one on the right."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(1, 15, device=embedding.device).reshape(2, 7) % len(embedding)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -1:] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


class StateFile:
    """The trunk's states of many rows of token ids, computed once and read in every epoch of a training.

    In a file: they take `tokens x hidden size x 4` bytes. The operating system keeps in memory what fits there.
    """

    def __init__(
        self,
        path: Path,
        trunk: Trunk,
        rows: Iterable[Sequence[int]],
        *,
        batch_size: int = 32,
        on_progress: OnProgress = ignore,
    ):
        """Compute the states of every row that differs; `on_progress` is told how many more are done."""
        self._path, self._trunk = path, trunk
        distinct = sorted(set(map(tuple, rows)), key=lambda row: (len(row), row))
        ends = list(accumulate(map(len, distinct)))
        self._places = {row: slice(end - len(row), end) for row, end in zip(distinct, ends, strict=True)}
        for start in range(0, len(distinct), batch_size):
            part = distinct[start : start + batch_size]
            states = trunk.states(_right_padded(part, device=trunk.device)).cpu()
            if start == 0:
                self._states = _in_file(path, (ends[-1], states.shape[-1]), states.dtype)
            for row, of_row in zip(part, states, strict=True):
                self._states[self._places[row]] = of_row[: len(row)]
            on_progress(len(part))

    def handing_on(self, model: Any, rows: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """Inside the block `model`, fed these rows padded on the right, runs without its lowest layers.

        Raises KeyError for a row that was not there from the start.
        """
        states = pad_sequence([self._states[self._places[tuple(row)]] for row in rows], batch_first=True)
        return self._trunk.handing_on(model, states.to(self._trunk.device))

    def remove(self) -> None:
        """Delete the file, which nothing is read from any more."""
        self._path.unlink(missing_ok=True)


def _right_padded(rows: Sequence[Sequence[int]], *, device: torch.device) -> dict[str, Tensor]:
    """A model's inputs for rows of token ids, padded on the right with what the mask hides."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = pad_rows(rows, pad=0, side="right").to(device)
    return {"input_ids": ids, "attention_mask": length_mask(lengths, ids.shape[1]).long()}


def _in_file(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # its whole room now: on a full disk, writing to it later would kill the process
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)

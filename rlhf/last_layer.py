"""The last layer of a model at those positions alone that are read.

PPO reads what a model says about the completion, and a reward model what it says at a row's last token. What the last
layer makes of the other positions is never looked at, but for the keys and values that the read ones attend to: so its
attention and all that follows run at the read ones only. That is exact, and proven for each model before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.models import autocast, layers_of
from rlhf.sharding import is_sharded
from rlhf.trunk import EXACT, is_mixed, padded_example
from rlhf.types import UserError

Pick = Callable[[Tensor, int], Tensor]
"""The read positions of a tensor (B, ...), which stand along this dimension."""

ROUNDED = 0.1
"""The same in bf16, where fewer rows at a time are multiplied with other roundings."""

_proven: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def last_layer_at(model: Any, positions: int | Tensor) -> Iterator[bool]:
    """Inside the block, the last hidden states of `model` are those of the read positions alone, (B, W, D).

    The last W positions for an integer W, or for a tensor (B,) one position of each row, W = 1. Yields whether it is
    so: with a model for which it is not exact, or whose last layer does not run anyway, nothing changes.
    """
    layer = _last_layer(model)
    if layer is None or "forward" in vars(layer) or is_sharded(next(layer.parameters())) or not _is_exact(model):
        yield False
        return
    with _narrowed(layer, positions):
        yield True


def _last_layer(model: Any) -> nn.Module | None:
    with suppress(UserError):  # it has no list of layers
        return layers_of(model)[1][-1]


@contextmanager
def _narrowed(layer: Any, positions: int | Tensor) -> Iterator[None]:
    pick = partial(_last, positions) if isinstance(positions, int) else partial(_one_each, positions)
    layer.forward = partial(_forward, layer.forward, pick)
    try:
        yield
    finally:
        del layer.forward  # the class's own shows again


def _last(width: int, of: Tensor, dim: int) -> Tensor:
    return of.narrow(dim, of.shape[dim] - width, width)


def _one_each(positions: Tensor, of: Tensor, dim: int) -> Tensor:
    rows = torch.arange(len(positions), device=of.device)
    of = of.expand(len(positions), *of.shape[1:])
    return of.transpose(1, dim)[rows, positions].unsqueeze(1).transpose(1, dim)


def _forward(forward: Callable[..., Any], pick: Pick, hidden_states: Tensor, **named: Any) -> Any:
    """What a layer returns, for the read positions: once to its keys and values, then from there on for those."""
    kept = _KeysAndValues()
    with suppress(_Reached):
        forward(hidden_states, **named | {"past_key_values": kept})
    narrow = {name: _of(pick, name, value, hidden_states) for name, value in named.items()}
    return forward(pick(hidden_states, 1), **narrow | {"past_key_values": kept})


def _of(pick: Pick, name: str, value: Any, hidden_states: Tensor) -> Any:
    """An argument of the layer, for the read positions."""
    if name == "attention_mask":
        length = hidden_states.shape[1]
        if value is None:  # a mask for as many queries as keys; fewer have to be told where they stand
            ones = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device)
            value = ones.tril()[None, None]
        return pick(value, 2)
    if name == "position_embeddings" and value is not None:
        return tuple(pick(each, 1) for each in value)
    return pick(value, 1) if name == "position_ids" and value is not None else value


class _KeysAndValues:
    """Stands in a cache's place: takes a layer's keys and values the first time, and gives them the second."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """See `transformers.Cache.update`."""
        if self._kept is None:
            self._kept = key, value
            raise _Reached
        return self._kept


class _Reached(Exception):
    """Ends a forward pass at the last layer's keys and values."""


# ---------------------------------------------------------------- proof


def _is_exact(model: Any) -> bool:
    if model not in _proven:
        with _unhanded(layers_of(model)[1]):
            _proven[model] = _gap(model) <= (ROUNDED if is_mixed(model) else EXACT)
    return _proven[model]


@contextmanager
def _unhanded(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, layers that hand the trunk's states on are themselves again."""
    handing = {layer: vars(layer).pop("forward") for layer in layers if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in handing.items():
            layer.forward = forward


@torch.no_grad()
def _gap(model: Any) -> float:
    """Largest difference that it makes to last hidden states.

    Of one row that is padded on the left, one that is padded on the right, and one that is not, for which no mask is
    made. One at a time: more might not fit where memory is short.
    """
    inputs, layer = padded_example(model), layers_of(model)[1][-1]
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    gaps: list[Tensor] = []
    with autocast(inputs["input_ids"].device, torch.bfloat16 if is_mixed(model) else torch.float32):
        for row, first, end in ((0, 0, 7), (1, 0, 7), (1, 0, 6)):
            given = {name: value[row : row + 1, first:end] for name, value in inputs.items()}
            sound = body(**given, use_cache=False).last_hidden_state
            is_token = given["attention_mask"][0].bool()
            last = is_token.nonzero()[-1]
            for positions, read in ((2, slice(-2, None)), (last, slice(int(last), int(last) + 1))):
                try:
                    with _narrowed(layer, positions):
                        found = body(**given, use_cache=False).last_hidden_state[0]
                    gaps.append((found - sound[0, read])[is_token[read]].abs().max())
                except Exception:  # whatever a model of any architecture may raise over a layer that returns less
                    return float("inf")
    return float(torch.stack(gaps).max())  # not a number where one of them is not

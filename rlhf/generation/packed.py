"""Linear layers of a sampling copy with their weights laid out once for the processor.

For a matrix product, oneDNN first copies the weights into an order of its own. While decoding, every weight meets only
a few rows, and that copying takes about as long as the product. Here it is done once for each version of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


class Packed:
    """The linear layers of `model`, which is only sampled from; empty where the processor gains nothing by it.

    Weights that nothing else reads are kept in the packed order alone.
    """

    def __init__(self, model: nn.Module, *, rows: int) -> None:
        """`rows` is how many usually meet a weight at once."""
        self._rows = rows
        linear = [layer for layer in model.modules() if type(layer) is nn.Linear and _can_be_packed(layer.weight)]
        others = (module for module in model.modules() if type(module) is not nn.Linear)
        shared = {id(weight) for module in others for weight in module.parameters(recurse=False)}
        self._layers: dict[int, list[nn.Linear]] = {}
        self._dropped: set[int] = set()
        for layer in linear:
            self._pack(layer, layer.weight)
            if id(layer.weight) not in shared:
                layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
            self._layers.setdefault(id(layer.weight), []).append(layer)

    @torch.no_grad()
    def take(self, weight: Tensor, value: Tensor) -> None:
        """Give a weight of the model a new value, of any precision."""
        if weight.numel():
            weight.copy_(value)
        for layer in self._layers.get(id(weight), []):
            self._pack(layer, value)
        self._dropped.discard(id(weight))

    def drop(self) -> None:
        """Let go of what was packed, until the weights are taken anew."""
        for layer in chain(*self._layers.values()):
            layer.forward = _dropped
        self._dropped = set(self._layers)

    def lacks(self, weight: Tensor) -> bool:
        """Whether a weight of the model was dropped."""
        return id(weight) in self._dropped

    @torch.no_grad()
    def _pack(self, layer: nn.Linear, value: Tensor) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(value.detach().to(torch.bfloat16), self._rows)
        layer.forward = PackedLinear(packed, layer.bias)


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _dropped(input: Tensor) -> Tensor:
    raise RuntimeError("the engine rests: call its `sync` before its `generate`")


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """The product with a packed weight (out, in), alone or with what follows it, which is then done on the way out."""

    weight: Any
    bias: Tensor | None

    def __call__(self, input: Tensor) -> Tensor:
        """(..., out) from (..., in)."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")

    def silu(self, input: Tensor) -> Tensor:
        """silu(input weight^T + bias)."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "swish", [], "")

    def plus(self, input: Tensor, other: Tensor) -> Tensor:
        """input weight^T + bias + other."""
        return torch.ops.mkldnn._linear_pointwise.binary(input, other, self.weight, self.bias, "add")

    def times(self, input: Tensor, other: Tensor) -> Tensor:
        """(input weight^T + bias) other."""
        return torch.ops.mkldnn._linear_pointwise.binary(input, other, self.weight, self.bias, "mul")

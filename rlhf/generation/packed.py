"""Linear layers of a sampling copy with their weights laid out once for the processor.

For a matrix product, oneDNN first copies the weights into an order of its own. While decoding, every weight meets only
a few rows, and that copying takes about as long as the product. Here it is done once for each version of a weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Packed:
    """The linear layers of `model`, which is only sampled from; empty where the processor gains nothing by it."""

    def __init__(self, model: nn.Module, *, rows: int) -> None:
        """`rows` is how many usually meet a weight at once."""
        self._rows = rows
        self._layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _can_be_packed(layer.weight)]
        for layer in self._layers:
            self._pack(layer)

    def renew(self, changed: set[int]) -> None:
        """Lay out again the weights whose `id` is among those changed."""
        for layer in self._layers:
            if id(layer.weight) in changed:
                self._pack(layer)

    def _pack(self, layer: nn.Linear) -> None:
        with torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), self._rows)
        layer.forward = partial(_product, packed, layer.bias)


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _product(packed: Any, bias: Tensor | None, input: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")

"""Floating-point operations of a decoder, counted from the parameters that multiply: 2 a parameter and token.

Attention adds 4 a head width and pair of positions (queries times keys, weights times values), counted over the whole
square although half of it is masked. The last layer is counted over all positions, although most of it runs at those
alone that are read. Norms, activations and softmax are left out. A backward pass costs the product again for the
gradient of what a weight was fed, and again for its own where it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlhf.models import layers_of


@dataclass(frozen=True)
class Fed:
    """What goes through a model, in one forward pass or in many."""

    tokens: float
    """Positions, padding included."""
    pairs: float
    """Of a position and one that it may look at: the square of the width, over all rows."""
    completion: float = 0.0
    """Positions that the LM head runs on."""

    def __add__(self, other: Fed) -> Fed:
        return Fed(self.tokens + other.tokens, self.pairs + other.pairs, self.completion + other.completion)

    def times(self, factor: float) -> Fed:
        """So many of it."""
        return Fed(self.tokens * factor, self.pairs * factor, self.completion * factor)


@dataclass(frozen=True)
class Layers:
    """Some layers of a decoder."""

    weights: int
    """Parameters that multiply; an adapter's are among them."""
    trained: int
    attention: int
    """Width of all heads together, over all layers."""

    @staticmethod
    def of(model: Any, layers: Iterable[nn.Module]) -> Layers:
        """Matrices multiply; vectors (norms, biases) do not."""
        layers = list(layers)
        matrices = [weight for layer in layers for weight in layer.parameters() if weight.ndim == 2]
        config = model.config.get_text_config()
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Layers(
            weights=sum(weight.numel() for weight in matrices),
            trained=sum(weight.numel() for weight in matrices if weight.requires_grad),
            attention=head_width * config.num_attention_heads * len(layers),
        )

    def forward(self, fed: Fed) -> float:
        """FLOPs of a forward pass."""
        return 2 * self.weights * fed.tokens + 4 * self.attention * fed.pairs

    def backward(self, fed: Fed) -> float:
        """FLOPs of the backward pass through all of these layers; none where none of them is trained."""
        if not self.trained:
            return 0.0
        return 2 * (self.weights + self.trained) * fed.tokens + 8 * self.attention * fed.pairs


@dataclass(frozen=True)
class Decoder:
    """A policy: the frozen layers that run once (the trunk), those above, and the LM head."""

    trunk: Layers
    above: Layers
    head: int
    """Parameters of the LM head."""
    head_is_trained: bool

    @staticmethod
    def of(model: Any, *, trunk_depth: int) -> Decoder:
        """Take a causal language model apart."""
        _, layers = layers_of(model)
        head = model.get_output_embeddings().weight
        below, above = list(layers)[:trunk_depth], list(layers)[trunk_depth:]
        return Decoder(Layers.of(model, below), Layers.of(model, above), head.numel(), head.requires_grad)

    def sampling(self, fed: Fed) -> float:
        """FLOPs of decoding: every layer once a token, by means of the cache, and the head once a sampled token."""
        return self.trunk.forward(fed) + self.forward(fed)

    def forward(self, fed: Fed) -> float:
        """FLOPs of what measures logprobs on the trunk's states."""
        return self.above.forward(fed) + 2 * self.head * fed.completion

    def backward(self, fed: Fed) -> float:
        """FLOPs of the gradient; very large micro-batches compute their logits twice, see `rlhf.lm_head.KEPT`."""
        of_head = (4 if self.head_is_trained else 2) * self.head * fed.completion
        return self.above.backward(fed) + of_head


def of_whole(model: Any) -> Layers:
    """All layers of a model without an LM head: a reward model, a critic."""
    return Layers.of(model, layers_of(model)[1])

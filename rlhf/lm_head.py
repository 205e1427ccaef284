"""Logprobs and entropies straight from hidden states: LM head and softmax in one, a chunk of tokens at a time.

Over a vocabulary of 50,000 the logits are by far the largest tensor of PPO, and nobody wants them: the loss needs one
number a token. Here they exist for a chunk only. Where the head is frozen, the gradient of a token's logprob with
respect to its hidden state, W[token] - sum_v p_v W[v], is computed while the probabilities are there: a row of the
hidden size is kept in place of a row of the vocabulary's, and the backward pass is one multiplication. Where it is
trained, the backward pass goes through the vocabulary in chunks, over all tokens: then the gradient of each row of the
head is finished at once, and a sum as large as the head is not read and written for every chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 6_000_000
"""Logits that exist at a time: 24 MB in fp32, which the caches of a processor still help with."""


@dataclass(frozen=True)
class LMHead:
    """The LM head of a causal language model that is a plain linear layer on its decoder's last hidden state."""

    linear: nn.Linear
    decoder: Any

    @staticmethod
    @torch.no_grad()
    def of(policy: Any) -> LMHead | None:
        """The head, or None where logits are more than a linear map (Gemma 2 caps them), which is measured."""
        model = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        linear, decoder = model.get_output_embeddings(), model.base_model
        if type(linear) is not nn.Linear:
            return None
        ids = torch.arange(1, 8, device=linear.weight.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
        own = linear(decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return LMHead(linear, decoder) if torch.equal(logits, own) else None

    @contextmanager
    def sparse_embedding(self) -> Iterator[None]:
        """Inside the block the embedding's gradient is one of the rows that were read, if the head shares its weights.

        It ends in the head's own, which is as large as the vocabulary, and need not be as large itself. On a CPU: a GPU
        adds rows in any order, and no two runs would be the same.
        """
        embedding, weight = self.decoder.get_input_embeddings(), self.linear.weight
        tied = isinstance(embedding, nn.Embedding) and embedding.weight is weight
        if not tied or embedding.sparse or weight.device.type != "cpu":
            yield
            return
        embedding.sparse = True
        try:
            yield
        finally:
            embedding.sparse = False

    def __call__(
        self, hidden: Tensor, tokens: Tensor, *, temperature: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Logprobs of `tokens` (N,) and entropies (N,), in nats and fp32, from hidden states (N, D).

        `dtype` is what the head multiplies in. The entropy carries no gradient.
        """
        weight, bias = self.linear.weight, self.linear.bias
        return _TokenStatistics.apply(hidden, weight, bias, tokens, temperature, dtype)  # pyright: ignore


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, dtype: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.dtype, ctx.input_dtype = temperature, dtype, hidden.dtype
        head_is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        wants_slopes = ctx.needs_input_grad[0] and not head_is_trained
        cast = weight.to(dtype)
        parts = [
            _statistics(rows, cast, bias, ids, temperature=temperature, wants_slopes=wants_slopes)
            for rows, ids in _chunks(hidden.to(dtype), tokens, len(weight))
        ]
        logprobs, entropies, normalisers, slopes = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(*((slopes,) if wants_slopes else (hidden, weight, bias, tokens, normalisers)))
        ctx.wants_slopes = wants_slopes
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        upstream = gradients[0] / ctx.temperature
        if ctx.wants_slopes:
            (slopes,) = ctx.saved_tensors
            return (slopes * upstream[:, None]).to(ctx.input_dtype), None, None, None, None, None
        hidden, weight, bias, tokens, normalisers = ctx.saved_tensors
        rows = hidden.to(ctx.dtype)
        of_hidden = normalisers.new_zeros(rows.shape) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight)
        of_bias = torch.empty_like(bias) if bias is not None else None
        size = _chunk_size(len(rows))
        for start in range(0, len(weight), size):
            here = slice(start, start + size)
            cast = weight[here].to(ctx.dtype)
            scaled = _scaled_logits(rows, cast, None if bias is None else bias[here], ctx.temperature)
            of_logits = scaled.sub_(normalisers[:, None]).exp_().mul_(-upstream[:, None])
            (chosen,) = torch.where((tokens >= start) & (tokens < start + size))
            of_logits[chosen, tokens[chosen] - start] += upstream[chosen]
            if of_bias is not None:
                of_bias[here] = of_logits.sum(0)
            of_logits = of_logits.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden += of_logits @ cast
            of_weight[here] = of_logits.T @ rows
        of_hidden = of_hidden.to(ctx.input_dtype) if of_hidden is not None else None
        return of_hidden, of_weight, of_bias, None, None, None


def _chunk_size(others: int) -> int:
    """How many rows of so many numbers stand together."""
    return max(CHUNK // max(others, 1), 16)


def _chunks(hidden: Tensor, tokens: Tensor, vocabulary: int) -> Any:
    size = _chunk_size(vocabulary)
    return zip(hidden.split(size), tokens.split(size), strict=True)


def _scaled_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Logits / temperature (n, V) in fp32 or better."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        scaled /= temperature
    return scaled


def _statistics(
    rows: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *, temperature: float, wants_slopes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one chunk: logprobs (n,), entropies (n,), the logs of what the softmax divides by (n,), and slopes (n, D).

    A slope is d logprob / d hidden, times the temperature.
    """
    shifted = _scaled_logits(rows, weight, bias, temperature)
    largest = shifted.amax(-1, keepdim=True)
    shifted -= largest
    chosen = shifted.gather(-1, tokens[:, None]).squeeze(-1)
    weights = shifted.exp()
    total = weights.sum(-1)
    shifted.clamp_(min=torch.finfo(shifted.dtype).min)  # an impossible token counts 0 in the entropy, not 0 * inf
    entropy = total.log() - torch.linalg.vecdot(weights, shifted) / total
    slopes = weight.new_empty(len(tokens), 0)
    if wants_slopes:
        with torch.autocast(weight.device.type, enabled=False):
            mean = weights.div_(total[:, None]).to(weight.dtype) @ weight
        slopes = weight[tokens].to(total.dtype) - mean.to(total.dtype)
    return chosen - total.log(), entropy, largest.squeeze(-1) + total.log(), slopes

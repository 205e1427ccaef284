"""Logprobs and entropies straight from hidden states: LM head and softmax in one, a chunk of tokens at a time.

Over a vocabulary of 50,000 the logits are by far the largest tensor of PPO, and nobody wants them: the loss needs one
number a token. Here they exist for a chunk only. Where a gradient is wanted, the forward pass goes on while a chunk is
there: with the errors e_v = p_v - [v is the token], the gradient of a token's logprob with respect to its hidden state
is -sum_v e_v W[v], a row of the hidden size. That of a trained head is -sum over tokens of e_v hidden: the errors of a
micro-batch are kept for it where they are few, and made anew from the normalisers where they are many, by chunks of the
vocabulary, over all tokens: each row of the head is then finished at once, and a sum as large as the head is not read
and written for every chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 6_000_000
"""Logits that exist at a time: 24 MB in fp32, which the caches of a processor still help with."""
KEPT = 32_000_000
"""Errors that are kept for the backward pass of a trained head: 64 MB in bf16, over 49,152 tokens those of 651."""


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
        if not torch.is_grad_enabled():  # an autograd function is not told, and would prepare for a backward pass
            hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        return _TokenStatistics.apply(hidden, weight, bias, tokens, temperature, dtype)  # pyright: ignore


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, dtype: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.dtype, ctx.input_dtype = temperature, dtype, hidden.dtype
        of_hidden, of_head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        keeps = of_head and len(tokens) * len(weight) <= KEPT
        cast = weight.to(dtype)
        parts = [
            _statistics(rows, cast, bias, ids, temperature=temperature, slopes=of_hidden, errors=keeps)
            for rows, ids in _chunks(hidden.to(dtype), tokens, len(weight))
        ]
        logprobs, entropies, normalisers, slopes, errors = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropies)
        for_head = (hidden, weight, bias, tokens, normalisers, errors if keeps else None) if of_head else ()
        ctx.save_for_backward(slopes, *for_head)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        upstream = gradients[0] / ctx.temperature
        slopes, *for_head = ctx.saved_tensors
        of_hidden = (slopes * upstream[:, None]).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None
        if not for_head:
            return of_hidden, None, None, None, None, None
        hidden, weight, bias, tokens, normalisers, kept = for_head
        pulls = (hidden * -upstream[:, None]).to(ctx.dtype)
        of_weight = torch.empty_like(weight)
        of_bias = torch.empty_like(bias) if bias is not None else None
        pieces: Iterable[tuple[slice, Tensor]] = [(slice(None), kept)]
        if kept is None:
            pieces = _errors_again(hidden.to(ctx.dtype), weight, bias, tokens, normalisers, ctx.temperature)
        for here, errors in pieces:
            of_weight[here] = errors.T @ pulls
            if of_bias is not None:
                of_bias[here] = errors.T.to(upstream.dtype) @ -upstream
        return of_hidden, of_weight, of_bias, None, None, None


def _chunk_size(others: int) -> int:
    """How many rows of so many numbers stand together."""
    return max(CHUNK // max(others, 1), 16)


def _chunks(hidden: Tensor, tokens: Tensor, vocabulary: int) -> Any:
    """Rows and their tokens, in as few parts as may be, all about as large."""
    count = max(-(-len(tokens) // _chunk_size(vocabulary)), 1)
    return zip(hidden.tensor_split(count), tokens.tensor_split(count), strict=True)


def _scaled_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Logits / temperature (n, V) in fp32 or better."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        scaled /= temperature
    return scaled


class _Statistics(NamedTuple):
    """Of one chunk of n tokens."""

    logprobs: Tensor
    entropies: Tensor
    normalisers: Tensor
    """(n,) the logs of what the softmax divides by."""
    slopes: Tensor
    """(n, D) d logprob / d hidden, times the temperature; empty where not asked for."""
    errors: Tensor
    """(n, V) -d logprob / d logit, times the temperature, in what the head multiplies in; empty where not asked for."""


def _statistics(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    *,
    temperature: float,
    slopes: bool,
    errors: bool,
) -> _Statistics:
    shifted = _scaled_logits(rows, weight, bias, temperature)
    largest = shifted.amax(-1, keepdim=True)
    shifted -= largest
    chosen = shifted.gather(-1, tokens[:, None]).squeeze(-1)
    weights = shifted.exp()
    total = weights.sum(-1)
    shifted.clamp_(min=torch.finfo(shifted.dtype).min)  # an impossible token counts 0 in the entropy, not 0 * inf
    entropy = total.log() - torch.linalg.vecdot(weights, shifted) / total
    normalisers = largest.squeeze(-1) + total.log()
    slope = error = nothing = weight.new_empty(len(tokens), 0)
    if slopes or errors:
        error = _minus_one_hot(weights.div_(total[:, None]), tokens).to(weight.dtype)
    if slopes:
        with torch.autocast(weight.device.type, enabled=False):
            slope = -(error @ weight)
    return _Statistics(chosen - total.log(), entropy, normalisers, slope, error if errors else nothing)


def _errors_again(
    rows: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, normalisers: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """The errors of all tokens, a chunk of the vocabulary at a time: which, and (N, chunk)."""
    size = _chunk_size(len(rows))
    for start in range(0, len(weight), size):
        here = slice(start, start + size)
        scaled = _scaled_logits(rows, weight[here].to(rows.dtype), None if bias is None else bias[here], temperature)
        chances = scaled.sub_(normalisers[:, None]).exp_()
        is_here = (tokens >= start) & (tokens < start + size)
        yield here, _minus_one_hot(chances, tokens - start, is_here).to(rows.dtype)


def _minus_one_hot(chances: Tensor, tokens: Tensor, where: Tensor | None = None) -> Tensor:
    """Take 1 from each row's own token. Before rounding: near 1 the difference is what counts."""
    rows = torch.arange(len(tokens), device=tokens.device)
    rows, tokens = (rows, tokens) if where is None else (rows[where], tokens[where])
    chances[rows, tokens] -= 1
    return chances

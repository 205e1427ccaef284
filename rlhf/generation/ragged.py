"""Attention over rows of different lengths in one forward pass, at a cost of the tokens that there are.

A pass is one long line of tokens: the next token of every row that is being decoded, then the prompts that are read for
the first time, one after another. All of a model but its attention works on each token by itself and never notices.
The attention is here. A decoding row sees its keys and values, which lie in blocks of a pool; a prompt sees itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.sequences import length_mask

BLOCK = 32
"""Tokens of a block: fewer waste less in a row's last one, more make larger products."""
UNSEEN = -1e30
"""Added to the scores of what is not seen. Finite, because a block may hold nothing that is."""
FEW = 8
"""Blocks up to which torch's fused kernel attends: one call in place of several, but slow over many short rows."""


# ---------------------------------------------------------------- what is kept


@dataclass(eq=False)
class Row:
    """The place of one row in the pool."""

    length: int = 0
    """Tokens whose keys and values are kept."""
    blocks: list[int] = field(default_factory=list)
    """Where in the pool each `BLOCK` of them lies."""


class KeyValues:
    """The keys and values of every layer, in a pool of blocks of which the first ones are in use."""

    def __init__(self) -> None:
        self._holders: list[tuple[Row, int]] = []
        self._room = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def holders(self) -> Sequence[tuple[Row, int]]:
        """Of each block in use: the row it belongs to, and the number of its first token there."""
        return self._holders

    def lengthen(self, row: Row, tokens: int) -> None:
        """Let a row grow by so many tokens, which a pass then writes."""
        row.length += tokens
        while len(row.blocks) * BLOCK < row.length:
            self._holders.append((row, len(row.blocks) * BLOCK))
            row.blocks.append(len(self._holders) - 1)
        if len(self._holders) > self._room:
            self._room = max(len(self._holders), self._room * 3 // 2)
            widened = {layer: (self._widened(k), self._widened(v)) for layer, (k, v) in self._layers.items()}
            self._layers = widened

    def copy_of(self, row: Row) -> Row:
        """A new row that holds the same."""
        twin = Row()
        self.lengthen(twin, row.length)
        self._copy(row.blocks, twin.blocks)
        return twin

    def release(self, rows: Sequence[Row]) -> None:
        """Give up what rows hold; the last blocks of the pool move into the gaps."""
        free = {block for row in rows for block in row.blocks}
        left = len(self._holders) - len(free)
        gaps = [block for block in free if block < left]
        moved = [block for block in range(left, len(self._holders)) if block not in free]
        self._copy(moved, gaps)
        for source, target in zip(moved, gaps, strict=True):
            row, start = self._holders[target] = self._holders[source]
            row.blocks[start // BLOCK] = target
        del self._holders[left:]

    def of_layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks, heads, BLOCK, D) each, made like `key` and `value` (N, heads, D) where they are new."""
        if layer not in self._layers:
            self._layers[layer] = (self._empty(key), self._empty(value))
        return self._layers[layer]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._room, like.shape[1], BLOCK, like.shape[2])

    def _copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if sources:
            for tensor in chain(*self._layers.values()):
                tensor[list(targets)] = tensor[list(sources)]

    def _widened(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self._room, *old.shape[1:])
        new[: len(old)] = old
        return new


# ---------------------------------------------------------------- a pass


class Pass:
    """One forward pass over the next token of some rows, then over whole prompts."""

    def __init__(
        self,
        cache: KeyValues,
        rows: Sequence[Row],
        prompts: Sequence[tuple[int, Sequence[Row]]],
        *,
        device: torch.device,
    ):
        """Lengthen all rows by what they are fed. `prompts`: their lengths, and the new rows that get what is read."""
        self._cache, self._count = cache, len(rows)
        self._tensor = partial(torch.tensor, dtype=torch.long, device=device)
        self._lengths = [length for length, _ in prompts]
        self.windows: dict[int, int | None] = {}
        """How many tokens each layer turned out to see; None for all."""
        self._masks: dict[int | None, Tensor] = {}
        written = [(token, *_grown(cache, row, 1)[0]) for token, row in enumerate(rows)]
        first = len(rows)
        for length, receivers in prompts:
            for row in receivers:
                written += [(first + i, *place) for i, place in enumerate(_grown(cache, row, length))]
            first += length
        self._written = self._tensor(written).T  # each token's number in the line, its block, and its place there
        slots = {id(row): slot for slot, row in enumerate(rows)}
        held = [(slots.get(id(row), len(rows)), start, row.length) for row, start in cache.holders]
        self._slot, self._start, self._length = self._tensor(held).T  # of each block

    @property
    def rows(self) -> int:
        """How many it is for, each prompt as one."""
        return self._count + len(self._lengths)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **how: Any
    ) -> Tensor:
        """(1, N, H, D) from query (1, H, N, D), key and value (1, H / groups, N, D) of the line's N tokens.

        `window` is how many tokens the layer sees, the token's own among them; `how`: `scaling`, and `softcap` where
        the layer caps its scores.
        """
        self.windows[layer] = window
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (N, heads, D)
        keys, values = self._cache.of_layer(layer, key, value)
        token, block, place = self._written
        keys[block, :, place], values[block, :, place] = key[token], value[token]
        parts = []
        if self._count:
            parts.append(self._decode(query[: self._count], keys, values, window, **how))
        if self._lengths:
            first = self._count
            parts.append(self._read(query[first:], key[first:], value[first:], window, **how))
        return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None]

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """(R, H, D) of one new token a row, which sees the blocks of that row.

        Every block is multiplied with its row's query, and a row's blocks are then weighed against each other: a
        softmax in parts. Query heads that share keys and values stand as so many queries of one head.
        """
        query = torch.cat([query, query.new_zeros(1, *query.shape[1:])])  # the last: of blocks that no row here holds
        used, heads = len(self._slot), keys.shape[1]
        grouped = query[self._slot].unflatten(1, (heads, -1))  # (blocks, heads, queries of each, D)
        is_plain = softcap is None and keys.shape[-1] == values.shape[-1]  # what the fused kernel can do
        attended = _fused if is_plain and query.device.type == "cpu" and used <= FEW else _in_steps
        found, top, total = attended(
            grouped, keys[:used], values[:used], unseen=self._unseen(window), scaling=scaling, softcap=softcap
        )
        highest = top.new_full((self._count + 1, *top.shape[1:]), UNSEEN)
        highest.scatter_reduce_(0, self._slot[:, None, None].expand_as(top), top, "amax")
        weights = (top - highest[self._slot]).exp_()
        sums = self._of_rows(found.float() * weights[..., None])
        return (sums / self._of_rows(total * weights)[..., None]).flatten(1, 2).to(values.dtype)

    def _of_rows(self, of_blocks: Tensor) -> Tensor:
        """(R, ...) sums over each row's blocks, from (blocks, ...)."""
        if of_blocks.device.type == "cpu":
            sums = of_blocks.new_zeros(self._count + 1, *of_blocks.shape[1:])
            return sums.index_add_(0, self._slot, of_blocks)[: self._count]
        # adding by index is done there in any order, which would make no two runs the same
        belongs = torch.nn.functional.one_hot(self._slot, self._count + 1).T.to(of_blocks.dtype)[: self._count]
        return (belongs @ of_blocks.flatten(1)).view(-1, *of_blocks.shape[1:])

    def _unseen(self, window: int | None) -> Tensor:
        """(blocks, 1, 1, BLOCK) what is added to scores: 0 where the row's new token sees, itself among them."""
        if window not in self._masks:
            places = self._start[:, None] + torch.arange(BLOCK, device=self._start.device)
            behind = self._length[:, None] - 1 - places
            seen = (behind >= 0) & (behind < window if window else True)
            self._masks[window] = torch.where(seen, 0.0, UNSEEN)[:, None, None]
        return self._masks[window]

    # ------------------------------------------------------------ prompts

    def _read(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """(N, H, D) of the tokens of whole prompts, padded for the moment."""
        places, is_token = self._padded
        query, key, value = (each[places].transpose(1, 2) for each in (query, key, value))  # (P, heads, L, D)
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        steps = torch.arange(places.shape[1], device=places.device)
        behind = steps[:, None] - steps
        seen = (behind >= 0) & (behind < window if window else True)
        return _attention(query, key, value, seen=seen, **how).transpose(1, 2)[is_token]

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """(P, longest) where each token stands among the prompts' tokens, and whether there is one."""
        lengths = self._tensor(self._lengths)
        is_token = length_mask(lengths, max(self._lengths))
        return (is_token.flatten().cumsum(0) - 1).clamp(min=0).view(is_token.shape), is_token


def _grown(cache: KeyValues, row: Row, tokens: int) -> list[tuple[int, int]]:
    """Lengthen a row; returns the block of each new token, and its place there."""
    before = row.length
    cache.lengthen(row, tokens)
    return [(row.blocks[place // BLOCK], place % BLOCK) for place in range(before, row.length)]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, seen: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """softmax(query key^T scaling) value over what is seen."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    scores = softcap * (scores / softcap).tanh()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype) @ value


def _fused(query: Tensor, key: Tensor, value: Tensor, *, unseen: Tensor, scaling: float, **_: Any) -> Any:
    """As `_in_steps`, in the kernel behind `scaled_dot_product_attention`, which does not tell what it divides by."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found, normaliser = kernel(query, key, value, attn_mask=unseen.to(query.dtype), scale=scaling)
    return found, normaliser, 1.0


def _in_steps(
    query: Tensor, key: Tensor, value: Tensor, *, unseen: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What queries (blocks, heads, Q, D) find in their blocks: sums of exp(score - top) value, `top`, and the total.

    The total is the sum of exp(score - top), by which the sums are still to be divided; `_fused` has divided by it, and
    its `top` is the log of what it divided by.
    """
    products = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, query.shape[:2])
    if softcap is not None:
        products, scaling = softcap * (products.float() * (scaling / softcap)).tanh(), 1.0
    scores = torch.add(unseen, products, alpha=scaling)  # in fp32
    top = scores.amax(-1)
    weights = scores.sub_(top[..., None]).exp_()
    sums = torch.bmm(weights.to(value.dtype).flatten(0, 1), value.flatten(0, 1)).unflatten(0, query.shape[:2])
    return sums, top, weights.sum(-1)

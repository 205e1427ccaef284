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

from rlhf.attention import LONGEST, plain
from rlhf.sequences import length_mask

BLOCK = 32
"""Tokens of a block: fewer waste less in a row's last one, more make larger products."""
UNSEEN = -1e30
"""Added to the scores of what is not seen. Finite, because a block may hold nothing that is."""
FEW = 32
"""Blocks up to which they are put together as rows, which takes fewer operations, but copies what is kept."""


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
        self._asking = self._slot.clamp(max=max(0, len(rows) - 1))  # what other rows' blocks give is not used
        longest = max((len(row.blocks) for row in rows), default=0)
        self._table: Tensor | None = None
        """(R, blocks of the longest row) where few blocks are there: those of each row, -1 where it has no more."""
        if len(rows) * longest <= FEW:
            self._table = self._tensor([row.blocks + [-1] * (longest - len(row.blocks)) for row in rows])

    @property
    def rows(self) -> int:
        """How many it is for, each prompt as one."""
        return self._count + len(self._lengths)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **how: Any
    ) -> Tensor:
        """(N, H, D) from query (N, H, D), key and value (N, H / groups, D) of the line's N tokens.

        `window` is how many tokens the layer sees, the token's own among them; `how`: `scaling`, and `softcap` where
        the layer caps its scores.
        """
        self.windows[layer] = window
        keys, values = self._cache.of_layer(layer, key, value)
        token, block, place = self._written
        if self._lengths:  # what a prompt's token makes may be written for several rows
            keys[block, :, place], values[block, :, place] = key[token], value[token]
        else:
            keys[block, :, place], values[block, :, place] = key, value
        parts = []
        if self._count:
            parts.append(self._decode(query[: self._count], keys, values, window, **how))
        if self._lengths:
            first = self._count
            parts.append(self._read(query[first:], key[first:], value[first:], window, **how))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """(R, H, D) of one new token a row, which sees the blocks of that row.

        Few blocks are put together as rows. Of many, each is multiplied with its row's query, and a row's blocks are
        then weighed against each other: a softmax in parts.
        """
        how = {"scaling": scaling, "softcap": softcap}
        unseen = self._unseen(window)
        if self._table is not None:
            key, value = (each[self._table].transpose(1, 2).flatten(2, 3) for each in (keys, values))
            return plain(query[:, :, None], key, value, unseen.to(query.dtype), **how).squeeze(2)
        used = len(self._slot)
        grouped = query[self._asking].unflatten(1, (keys.shape[1], -1))
        found, weighed = _of_blocks(grouped, keys[:used], values[:used], unseen=unseen, **how)
        highest = weighed.new_full((self._count + 1, *weighed.shape[1:]), UNSEEN)
        highest.scatter_reduce_(0, self._slot[:, None, None].expand_as(weighed), weighed, "amax")
        weights = (weighed - highest[self._slot]).exp_()
        sums = self._of_rows(found * weights[..., None])
        return (sums / self._of_rows(weights)[..., None]).flatten(1, 2).to(values.dtype)

    def _of_rows(self, of_blocks: Tensor) -> Tensor:
        """(R, ...) sums over each row's blocks, from (blocks, ...)."""
        if of_blocks.device.type == "cpu":
            sums = of_blocks.new_zeros(self._count + 1, *of_blocks.shape[1:])
            return sums.index_add_(0, self._slot, of_blocks)[: self._count]
        # adding by index is done there in any order, which would make no two runs the same
        belongs = torch.nn.functional.one_hot(self._slot, self._count + 1).T.to(of_blocks.dtype)[: self._count]
        return (belongs @ of_blocks.flatten(1)).view(-1, *of_blocks.shape[1:])

    def _unseen(self, window: int | None) -> Tensor:
        """What is added to scores: 0 where a row's new token sees, itself among them.

        (blocks, 1, 1, BLOCK), or, where there is a table of few, (R, 1, 1, tokens of the longest row).
        """
        if window not in self._masks:
            places = self._start[:, None] + torch.arange(BLOCK, device=self._start.device)
            behind = self._length[:, None] - 1 - places
            seen = (behind >= 0) & (behind < window if window else True)
            unseen = torch.where(seen, 0.0, UNSEEN)
            if self._table is not None:
                unseen = unseen[self._table].masked_fill_(self._table[..., None] < 0, UNSEEN).flatten(1)
            self._masks[window] = unseen[:, None, None]
        return self._masks[window]

    # ------------------------------------------------------------ prompts

    def _read(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """(N, H, D) of the tokens of whole prompts, padded for the moment."""
        places, is_token = self._padded
        query, key, value = (each[places].transpose(1, 2) for each in (query, key, value))  # (P, heads, L, D)
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
    """(P, H, L, D) softmax(query key^T scaling) value over what is seen."""
    if softcap is not None or (query.device.type == "cpu" and len(seen) <= LONGEST):
        return plain(query, key, value, seen, scaling=scaling, softcap=softcap)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)


def _of_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, unseen: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What queries (blocks, heads, Q, D) find in their blocks, and log sum exp(score) there, by which it weighs."""
    products = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, query.shape[:2])
    if softcap is not None:
        products, scaling = softcap * (products.float() * (scaling / softcap)).tanh(), 1.0
    scores = torch.add(unseen, products, alpha=scaling)  # in fp32
    weights = scores.softmax(-1)
    # the largest weight is exp(largest score) / sum exp(score)
    weighed = scores.amax(-1) - weights.amax(-1).log_()
    found = torch.bmm(weights.to(value.dtype).flatten(0, 1), value.flatten(0, 1)).unflatten(0, query.shape[:2])
    return found, weighed

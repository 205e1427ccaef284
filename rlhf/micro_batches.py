"""How a batch is cut into micro-batches, and how these are dealt into minibatches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf import ops
from rlhf.sequences import Sequences


def partition(
    sequences: Sequences,
    micro_batch_size: int,
    *,
    tokens: int | None = None,
    num_mini_batches: int = 1,
    reduce: ops.Reduce = ops.alone,
) -> list[Tensor]:
    """Rows of each micro-batch: neighbours in length, so that little padding is forwarded; the last may be smaller.

    With `tokens`, a micro-batch holds at most so many, padding included (a longer row stands alone), instead of
    `micro_batch_size` rows. There are then a multiple of `num_mini_batches` of about as many tokens each, and equally
    many in all processes, which `reduce` sums over; one a row where there are fewer rows.

    The same split measures the old logprobs and runs the update. A row's logprobs depend on its batch in the last bits,
    and in bf16 in more than those; with one split the ratio of the first minibatch is exactly 1.
    """
    by_length = (sequences.prompt_lengths + sequences.completion_lengths).argsort(stable=True)
    if tokens is None:
        return list(by_length.split(micro_batch_size))
    columns = (sequences.prompt_lengths[by_length].tolist(), sequences.completion_lengths[by_length].tolist())
    lengths = list(zip(*columns, strict=True))
    fewest = len(_sizes(lengths, tokens))
    count = min(-(-fewest // num_mini_batches) * num_mini_batches, len(lengths))
    count = _largest(count, len(lengths), sequences.device, reduce)
    # as little in the fullest of them as their number allows: that makes them even
    enough = bisect_left(range(tokens), True, key=lambda budget: len(_sizes(lengths, budget)) <= count)
    return _split_to(count, list(by_length.split(_sizes(lengths, enough))))


def deal(micro_batches: Sequence[Tensor], num_mini_batches: int, generator: torch.Generator) -> list[list[Tensor]]:
    """Micro-batches in random order, dealt into minibatches whose sizes differ by at most one."""
    order = torch.randperm(len(micro_batches), generator=generator)
    groups = [[micro_batches[i] for i in part.tolist()] for part in order.tensor_split(num_mini_batches)]
    return [group for group in groups if group]


def _sizes(lengths: Sequence[tuple[int, int]], tokens: int) -> list[int]:
    """Rows of the fewest neighbouring micro-batches of at most `tokens`, from the rows' prompts and completions.

    A micro-batch is as wide as its longest prompt and its longest completion, which need not be of one row.
    """
    sizes: list[int] = []
    widest = (0, 0)
    for prompt, completion in lengths:
        both = max(widest[0], prompt), max(widest[1], completion)
        if sizes and (sizes[-1] + 1) * sum(both) <= tokens:
            sizes[-1], widest = sizes[-1] + 1, both
        else:
            sizes.append(1)
            widest = prompt, completion
    return sizes


def _split_to(count: int, micro_batches: list[Tensor]) -> list[Tensor]:
    """The same rows in `count` micro-batches, of which there were as many or fewer: those of most rows are halved."""
    while len(micro_batches) < count:
        most = max(range(len(micro_batches)), key=lambda i: len(micro_batches[i]))
        micro_batches[most : most + 1] = micro_batches[most].tensor_split(2)
    return micro_batches


def _largest(number: int, limit: int, device: torch.device, reduce: ops.Reduce) -> int:
    """The largest of all processes' numbers, each at most `limit`, from their sums."""
    chosen = torch.zeros(limit + 1, device=device)
    chosen[number] = 1
    return int(reduce(chosen).nonzero().max())

"""Rankings as choices: from those that remain, which come next? Numbered for the rater model, and nothing more.

A ranking of K completions is at most K - 1 choices: its best level is chosen from all, the next from the rest, and so
on. What was not ranked takes no part.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rlhf.data import prompt_key
from rlhf.types import Ranking

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sets:
    """All A sets of at most `most` out of `size` completions."""

    shares: Floats
    """(A, size): each row sums to 1 over the members of a set."""
    extra: Floats
    """(A,): how many more than one there are in a set."""
    products: Floats
    """(A, size * size): outer product of each row of `shares` with itself."""


@cache
def all_sets(size: int, most: int) -> Sets:
    """Sets of one first, then of two, and so on; the set of the first t stands first among those of t."""
    sets = [each for tied in range(1, min(size, most) + 1) for each in combinations(range(size), tied)]
    shares = np.array([[(i in each) / len(each) for i in range(size)] for each in sets])
    products = np.einsum("ai,aj->aij", shares, shares).reshape(len(sets), -1)
    return Sets(shares, np.array([len(each) - 1.0 for each in sets]), products)


@dataclass(frozen=True)
class Choices:
    """N choices from r completions each; in every row those that were chosen stand first.

    `prompt`, `rater` (N,); `text` (N, r): the completion's number within its prompt; `place` (N, r): on the page,
    from 0; `tied` (N,): how many were chosen together.
    """

    prompt: Ints
    rater: Ints
    text: Ints
    place: Floats
    tied: Ints
    most_tied: int
    """No more than so many are ever tied, in any choice of the data."""

    @property
    def sets(self) -> Sets:
        """What could have been chosen."""
        return all_sets(self.text.shape[1], self.most_tied)

    @cached_property
    def chosen(self) -> Ints:
        """(N,): which of `sets` was chosen."""
        return np.searchsorted(self.sets.extra, self.tied - 1)

    def of(self, prompts: NDArray[np.bool_]) -> Choices:
        """Those of some prompts, which are numbered anew."""
        kept, numbers = prompts[self.prompt], np.cumsum(prompts) - 1
        rows = (numbers[self.prompt[kept]], self.rater[kept], self.text[kept], self.place[kept], self.tied[kept])
        return Choices(*rows, self.most_tied)


@dataclass(frozen=True)
class Numbered:
    """Rankings with numbers in the place of names."""

    prompts: dict[str, int]
    """By `prompt_key`."""
    texts: list[dict[str, int]]
    """The completions of each prompt that took part in a ranking."""
    choices: list[Choices]
    """One for each number of completions to choose from, 2 and more."""
    pairs: Ints
    """(prompts, raters): pairs of completions that each compared, ties included."""


@dataclass(frozen=True)
class _Said:
    prompt: int
    rater: int
    levels: list[list[int]]
    """Completions by their number within the prompt."""
    places: dict[int, int]


def number(rankings: Sequence[Ranking], raters: Sequence[str]) -> Numbered:
    """Number `rankings`, each by one of `raters`; without those that rank fewer than two different completions."""
    prompts: dict[str, int] = {}
    texts: list[dict[str, int]] = []
    numbers = {name: number for number, name in enumerate(raters)}
    pairs: Counter[tuple[int, int]] = Counter()
    said: list[_Said] = []
    for ranking in sorted(rankings, key=lambda each: (prompt_key(each.prompt), each.completions)):
        ranks = ranks_by_text(ranking)
        if len(ranks) < 2:
            continue
        prompt = prompts.setdefault(prompt_key(ranking.prompt), len(prompts))
        if prompt == len(texts):
            texts.append({})
        known = {text: texts[prompt].setdefault(text, len(texts[prompt])) for text in sorted(ranks)}
        shown = [ranking.completions[i] for i in ranking.presented_order or ()]
        places = {number: shown.index(text) if shown else 0 for text, number in known.items()}
        levels = [[known[text] for text in ranks if ranks[text] == level] for level in sorted(set(ranks.values()))]
        rater = numbers[ranking.annotator]
        said.append(_Said(prompt, rater, levels, places))
        pairs[prompt, rater] += len(ranks) * (len(ranks) - 1) // 2
    compared = np.zeros((len(prompts), len(raters)), dtype=np.int64)
    for place, count in pairs.items():
        compared[place] = count
    return Numbered(prompts, texts, _choices(said), compared)


def ranks_by_text(ranking: Ranking) -> dict[str, int]:
    """Completion -> rank; a text that stands twice counts once, and not at all where its copies were told apart."""
    seen: dict[str, set[int | None]] = defaultdict(set)
    for text, rank in zip(ranking.completions, ranking.ranks, strict=True):
        seen[text].add(rank)
    single = {text: next(iter(ranks)) for text, ranks in seen.items() if len(ranks) == 1}
    return {text: rank for text, rank in single.items() if rank is not None}


def _choices(said: Sequence[_Said]) -> list[Choices]:
    """Every step down every ranking, by how many completions there were to choose from."""
    rows: dict[int, list[tuple[int, int, list[int], list[int], int]]] = defaultdict(list)
    for each in said:
        for step, level in enumerate(each.levels):
            left = [text for below in each.levels[step:] for text in below]
            if len(left) > 1:
                places = [each.places[text] for text in left]
                rows[len(left)].append((each.prompt, each.rater, left, places, len(level)))
    most_tied = max((row[-1] for group in rows.values() for row in group), default=1)
    return [_group(rows[size], most_tied) for size in sorted(rows)]


def _group(rows: Sequence[tuple[int, int, list[int], list[int], int]], most_tied: int) -> Choices:
    prompt, rater, text, place, tied = (np.array(column) for column in zip(*rows, strict=True))
    return Choices(prompt, rater, text, place.astype(float), tied, most_tied)

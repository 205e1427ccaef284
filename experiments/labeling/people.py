"""People with planted faults, and what they rank. Plain sampling: nothing here comes from the model that is tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from rlhf.types import Ranking

World = Literal["choice", "noise"]
"""How people decide. `choice`: they choose the best of what is left, again and again, now and then several at once.
`noise`: they see each quality with normal noise and put together what they cannot tell apart."""
KINDS = ("ordinary", "swayed", "clicker", "spammer", "expert")


@dataclass(frozen=True)
class Person:
    """One of KINDS. `sharpness` is in logits per standard deviation of the quality, `sway` in logits per place."""

    name: str
    kind: str
    sharpness: float
    sway: float = 0.0
    tie_strength: float = 0.15


PEOPLE = (
    Person("ann", "ordinary", 1.0, 0.0),
    Person("bob", "ordinary", 1.3, 0.05),
    Person("cem", "ordinary", 1.6, 0.0),
    Person("dia", "ordinary", 1.9, -0.05),
    Person("swayed", "swayed", 1.5, 0.6),
    Person("clicker", "clicker", 0.0),
    Person("spammer", "spammer", 0.0),
    Person("expert", "expert", 4.0, tie_strength=0.1),
)


def rank(person: Person, quality: np.ndarray, place: np.ndarray, world: World, rng: np.random.Generator) -> list[int]:
    """What one person says of completions with these qualities, shown at these places (from 0)."""
    if person.kind == "spammer":
        return [int(each) + 1 for each in place]
    return (_by_choice if world == "choice" else _by_noise)(person, quality, place, rng)


def _by_choice(person: Person, quality: np.ndarray, place: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Sets are weighed one by one: geometric mean of the members' strengths, times what a tie of that size is worth."""
    strength = np.exp(person.sharpness * quality) * np.exp(-person.sway * place)
    left, ranks, level = list(range(len(quality))), [0] * len(quality), 1
    while left:
        sets = [each for size in range(1, len(left) + 1) for each in combinations(left, size)]
        weights = [
            person.tie_strength ** (len(each) - 1) * np.prod(strength[list(each)]) ** (1 / len(each)) for each in sets
        ]
        heap = np.cumsum(weights)
        best = sets[int(np.searchsorted(heap, rng.random() * heap[-1]))]
        for each in best:
            ranks[each] = level
        left = [each for each in left if each not in best]
        level += 1
    return ranks


def _by_noise(person: Person, quality: np.ndarray, place: np.ndarray, rng: np.random.Generator) -> list[int]:
    """A logistic difference of sharpness 1 is about a normal one of deviation 1.7."""
    seen = person.sharpness * quality - person.sway * place + 1.2 * rng.standard_normal(len(quality))
    order = np.argsort(-seen)
    ranks, level, top = [0] * len(quality), 1, seen[order[0]]
    for each in order:
        if top - seen[each] > person.tie_strength:
            level, top = level + 1, seen[each]
        ranks[each] = level
    return ranks


def rankings(
    seed: int,
    *,
    prompts: int,
    completions: int = 4,
    overlap: int = 4,
    people: Sequence[Person] = PEOPLE,
    world: World = "choice",
) -> list[Ranking]:
    """`overlap` people, drawn for each prompt, rank its completions, each in an order of their own."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        quality = rng.standard_normal(completions)
        texts = tuple(f"completion {prompt}.{i}" for i in range(completions))
        for number in rng.choice(len(people), overlap, replace=False):
            order = rng.permutation(completions)
            ranks = rank(people[number], quality, np.argsort(order), world, rng)
            shown = tuple(order.tolist())
            found.append(Ranking(f"prompt {prompt}", texts, tuple(ranks), people[number].name, shown))
    return found

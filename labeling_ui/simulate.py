"""Annotators with a known utility, in the place of people. They rank through the service, as the page does.

An annotator sees each completion's utility with noise of their own, likes what stands first on the page a little more,
and ties what they cannot tell apart. What an annotator says of an item depends on the seed alone, not on the turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from labeling_ui.agreement import agreement, tie_share
from labeling_ui.service import LabelService, Task
from rlhf.config import Simulation
from rlhf.data import prompt_key, resolve
from rlhf.progress import Bar
from rlhf.sources import told
from rlhf.stopping import StopRequest
from rlhf.store import Item
from rlhf.types import DataError, Prompt

Utility = Callable[[Prompt, str], float]


@dataclass(frozen=True)
class Annotator:
    """One simulated person; all numbers in standard deviations of the utility."""

    name: str
    temperature: float
    position_bias: float
    tie_threshold: float
    seed: int

    def rank(self, task: Task, utilities: Sequence[float]) -> list[list[int]]:
        """Tiers of places on the page, best first, from the utility at each place."""
        last = max(len(utilities) - 1, 1)
        noise = {text: self._noise(task.prompt, text) for text in task.completions}  # the same text, the same thought
        seen = [
            utility + self.temperature * noise[text] + self.position_bias * (0.5 - place / last)
            for place, (text, utility) in enumerate(zip(task.completions, utilities, strict=True))
        ]
        return _tiers(seen, self.tie_threshold)

    def _noise(self, prompt: Prompt, text: str) -> float:
        return float(_generator(self.seed, self.name, prompt_key(prompt), text).standard_normal())


def simulate(service: LabelService, config: Simulation, bar: Bar | None = None, stop: StopRequest | None = None) -> int:
    """Let the annotators rank, taking turns, until nothing is left for any of them; returns how many rankings.

    The turn is always with whoever has ranked least: after an interruption it goes on where it was.
    Raises ConfigError where the utility cannot be found, DataError where it does not return finite numbers, and Stopped
    after the turn in which `stop` was asked for.
    """
    judge = _Judge(resolve(config.utility), config.utility, service.store.items(service.policy.round))
    ranked = {each: service.progress(each.name).ranked for each in annotators(config)}
    done, told = 0, 0
    while ranked:
        before, fewest = done, min(ranked.values())
        for each in [each for each, count in ranked.items() if count == fewest]:
            if stop is not None:
                stop.heed("what was ranked is in the store: run it again to go on")
            if _turn(service, each, judge):
                ranked[each] += 1
                done += 1
            else:
                del ranked[each]
        if bar is not None and done > before:
            news = _numbers(service) if done >= 2 * told else {}
            told = done if news else told
            bar.advance(done - before, **news)
    return done


def _numbers(service: LabelService) -> dict[str, float]:
    """What a progress bar shows; read from the store, and therefore only now and then."""
    rankings = service.store.rankings(rounds=[service.policy.round])
    numbers = {"agreement": agreement(rankings, bootstrap=1).without_ties.value, "ties": tie_share(rankings)}
    return {name: value for name, value in numbers.items() if value is not None}


def annotators(config: Simulation) -> list[Annotator]:
    """The simulated people of a configuration. The seed decides who is how noisy, not how noisy they are together."""
    count = config.annotators
    spread = [NormalDist().inv_cdf((number + 0.5) / count) for number in range(count)]
    shuffled = _generator(config.seed, "temperatures").permutation(spread)
    return [
        Annotator(
            name=f"simulated-{number}",
            temperature=config.temperature * math.exp(config.temperature_spread * deviation),
            position_bias=config.position_bias,
            tie_threshold=config.tie_threshold,
            seed=config.seed,
        )
        for number, deviation in enumerate(shuffled.tolist(), start=1)
    ]


def _turn(service: LabelService, annotator: Annotator, judge: _Judge) -> bool:
    task = service.next_task(annotator.name)
    if task is None:
        return False
    tiers = annotator.rank(task, [judge(task.prompt, text) for text in task.completions])
    service.submit(annotator.name, task.id, task.key, tiers)
    return True


class _Judge:
    """The utility in standard deviations among the completions of a prompt; computed once for each text."""

    def __init__(self, utility: Utility, name: str, items: Sequence[Item]) -> None:
        self._utility, self._name = utility, name
        self._known: dict[tuple[str, str], float] = {}
        values = [[self._raw(item.prompt, each.text) for each in item.completions] for item in items]
        self._scale = _pooled_deviation(values)

    def __call__(self, prompt: Prompt, text: str) -> float:
        return self._raw(prompt, text) / self._scale

    def _raw(self, prompt: Prompt, text: str) -> float:
        place = (prompt_key(prompt), text)
        if place not in self._known:
            try:
                value = self._utility(prompt, text)
            except Exception as error:  # the function is the user's
                called = f"it is called as utility(prompt, completion), here with {text[:60]!r}"
                raise DataError(f"{self._name} failed{told(error)}: {called}") from error
            if not isinstance(value, int | float | np.number) or not math.isfinite(value):
                raise DataError(f"{self._name} returned {value!r} for {text[:60]!r}: it must return a finite number")
            self._known[place] = float(value)
        return self._known[place]


def _pooled_deviation(values: Sequence[Sequence[float]]) -> float:
    """Standard deviation about each prompt's own mean; raises DataError where nothing differs."""
    squares = [(value - float(np.mean(row))) ** 2 for row in values for value in row]
    freedom = sum(len(row) - 1 for row in values)
    if not squares or math.sqrt(sum(squares)) <= 1e-9 * max(abs(value) for row in values for value in row):
        raise DataError("the utility is the same for all completions of each prompt: there is nothing to rank by")
    return math.sqrt(sum(squares) / freedom)


def _tiers(seen: Sequence[float], threshold: float) -> list[list[int]]:
    """Places by falling value; a place no further than `threshold` below the first of a tier belongs to it."""
    tiers: list[list[int]] = []
    for place in sorted(range(len(seen)), key=lambda place: -seen[place]):
        if tiers and seen[tiers[-1][0]] - seen[place] <= threshold:
            tiers[-1].append(place)
        else:
            tiers.append([place])
    return tiers


def _generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16]))

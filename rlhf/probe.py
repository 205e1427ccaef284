"""Short pieces of a PPO step, timed and weighed: real sampling, then rollout and update on a few of the rows.

Every kind of call is made once before it counts, because the first is slower. How large the pieces may be is found by
beginning with small ones and asking what of the time is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlhf import rollout, update
from rlhf.gauge import Gauge
from rlhf.generation import Engine, Generated
from rlhf.ppo import Task
from rlhf.rates import Work
from rlhf.stopwatch import Stopwatch
from rlhf.workload import Row, decoding, forwarding, micro_batches

FEW_ROWS, FEW_TOKENS = 4, 8
"""Of the first calls, which say how much there is time for."""
GROWTH = 4
"""How many times as large the next piece is, where there is time."""
SLOWER_LATER = 0.7
"""How much of the time is planned for: with a longer cache, a token takes longer than the first ones did."""
Piece = tuple[Work, float]
"""Work with what it cost: seconds, or bytes."""


class Budget:
    """Seconds that may still be spent."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = seconds
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end; below 0 when it is over."""
        return self._end - self.clock()


# ---------------------------------------------------------------- sampling


@dataclass
class Sampling:
    """Calls to an engine that decodes `together` rows at a time."""

    engine: Engine
    prompts: Sequence[Sequence[int]]
    limit: int
    """Tokens of a completion, at most."""
    together: int
    refills: bool
    """See `workload.decoding`."""
    temperature: float
    gauge: Gauge
    pieces: list[Piece] = field(default_factory=list)
    weights: list[Piece] = field(default_factory=list)
    completions: list[Generated] = field(default_factory=list)
    sync_seconds: float = 0.0
    """Of taking over the weights, once a rollout."""
    _asked: int = 0

    def run(self, budget: Budget, *, enough: int) -> None:
        """Sample as the run will, for as long as there is time, until `enough` completions are known to their ends."""
        few, tokens = min(FEW_ROWS, self.together), min(FEW_TOKENS, self.limit)
        self.engine.sync()
        self._call(few, tokens, budget.clock, counts=False)
        self.engine.rest()  # as it is when a step begins
        live = self.gauge.live()
        started = budget.clock()
        self.engine.sync()
        self.sync_seconds = budget.clock() - started
        of_prompts = self._call(few, 1, budget.clock) / few
        rows = max(1, min(self.together, int(budget.left / 8 / max(of_prompts, 1e-9))))
        self._call(max(1, rows // GROWTH), tokens, budget.clock)
        spent = self._call(rows, tokens, budget.clock, live=live)
        step = max(spent - of_prompts * rows, spent / 4) / tokens
        longest = min(self.limit, int(SLOWER_LATER * (budget.left - of_prompts * rows) / max(step, 1e-9)))
        while longest >= tokens and len(self.completions) < enough + 3 * rows:
            spent = self._call(rows, longest, budget.clock, live=live)
            if spent > budget.left:
                break
        self.engine.rest()

    @property
    def seen_tokens(self) -> int:
        """The longest that was sampled."""
        return max(len(each.ids) for each in self.completions)

    def _call(
        self, count: int, limit: int, clock: Callable[[], float], *, counts: bool = True, live: int | None = None
    ) -> float:
        """Seconds of sampling the next `count` prompts."""
        prompts = [self.prompts[(self._asked + i) % len(self.prompts)] for i in range(count)]
        generator = torch.Generator().manual_seed(self._asked)
        self._asked += count
        started = clock()
        how = {"max_tokens": limit, "temperature": self.temperature, "generator": generator}
        sampled = rollout.sample(self.engine, prompts, **how)
        seconds = clock() - started
        self.together = min(self.together, self.engine.batch_size)  # where memory did not suffice for as many
        first = [ids not in prompts[:i] for i, ids in enumerate(prompts)]
        rows = [Row(len(ids), len(each.ids), new) for ids, each, new in zip(prompts, sampled, first, strict=True)]
        self.completions += sampled
        if counts:
            work = decoding(rows, together=self.together, refills=self.refills)
            self.pieces.append((work, seconds))
        if live is not None:
            self.weights.append((cached(rows), self.gauge.peak() - live))
        return seconds


def cached(rows: Sequence[Row]) -> Work:
    """What the memory of sampling depends on: tokens in the cache of rows that are decoded together."""
    width = max(row.prompt for row in rows) + max(row.completion for row in rows)
    return {"tokens": width * len(rows), "once": 1}


# ---------------------------------------------------------------- rollout and update


class Prepared:
    """An engine that has sampled already."""

    def __init__(self, completions: Sequence[Generated]) -> None:
        self.completions = completions
        self.batch_size = len(completions)

    def sync(self) -> None:
        """Nothing to take over."""

    def rest(self) -> None:
        """Nothing to give up."""

    def generate(self, prompts: Sequence[Sequence[int]], **_: Any) -> list[Generated]:
        """These completions, one for each prompt."""
        return list(self.completions[: len(prompts)])


@dataclass
class Training:
    """Rollouts and updates of a few rows: one micro-batch, one optimiser step."""

    task: Task
    """Its rows, engine, config and settings are changed here."""
    completions: Sequence[Generated]
    """One for each row of a micro-batch."""
    gauge: Gauge
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    weights: list[Piece] = field(default_factory=list)
    live: int = 0
    """Bytes in use between two steps: the weights, the reference, the optimiser's state, the reward."""
    optimizer_seconds: float = 0.0

    def run(self, budget: Budget) -> None:
        """Go from one row to a whole micro-batch, as far as there is time."""
        task = self.task
        whole = task.config
        alone = {"micro_batch_size": len(self.completions), "micro_batch_tokens": None, "num_mini_batches": 1}
        task.config = replace(whole, **alone)
        task.settings = replace(task.settings, num_ppo_epochs=1, **alone)
        try:
            self._grow(budget)
        finally:
            task.config = whole

    def _grow(self, budget: Budget) -> None:
        task, clock = self.task, budget.clock
        smallest = task.config.extras.rloo_samples or 1
        self._optimizer_step(clock)
        self.optimizer_seconds = self._optimizer_step(clock)
        self._step(smallest, clock, counts=False)
        self.live = self.gauge.live()
        self.weights.clear()
        count, spent = smallest, self._step(smallest, clock)
        while True:
            affordable = int(count * budget.left / max(2 * spent, 1e-9))
            if count == smallest and spent < budget.seconds / GROWTH:
                affordable = GROWTH * count  # one size alone would not tell what a call costs from what a token does
            following = min(len(self.completions), GROWTH * count, affordable) // smallest * smallest
            if following <= count:
                break
            count = following
            self._step(count, clock, counts=False)
            spent = self._step(count, clock)
        if self.has_warm_up:
            for counts in (False, True):
                self._step(count, clock, counts=counts, value_only=True)

    @property
    def has_warm_up(self) -> bool:
        """Whether the first steps of the run train the value only."""
        return self.task.config.value_warmup_steps > 0 and self.task.learner.model.value is not None

    def _step(self, count: int, clock: Callable[[], float], *, counts: bool = True, value_only: bool = False) -> float:
        """Seconds of a step with `count` rows; its parts become pieces where it counts."""
        task = self.task
        number = 0 if value_only else task.config.value_warmup_steps
        task.rows, task.engine = range(count), Prepared(self.completions[:count])
        started, watch = clock(), Stopwatch(clock)
        batch = task.rollout(number, kl_coef=task.config.kl_coef, lap=watch.lap)
        task.update(number, batch, kl_coef=task.config.kl_coef)
        watch.lap("value_only" if value_only else "update")
        lengths = zip(batch.prompt_lengths.tolist(), batch.completion_lengths.tolist(), strict=True)
        parts = micro_batches([Row(*each) for each in lengths], task.config.micro_batch_size)
        if counts:
            for part, spent in watch.seconds.items():
                alone = spent - (self.optimizer_seconds if part == "update" else 0.0)
                self.pieces.setdefault(part, []).append((forwarding(parts), max(alone, 0.0)))
        widest = max(each.tokens for each in parts)
        self.weights.append(({"tokens": widest, "once": 1}, self.gauge.peak() - self.live))
        return clock() - started

    def _optimizer_step(self, clock: Callable[[], float]) -> float:
        """Seconds of an optimiser step by itself, with the demonstrations that are mixed into it. Changes no weight."""
        task, config = self.task, self.task.config
        model = task.learner.model
        for weight in (*model.policy_parameters(), *model.value_parameters()):
            weight.grad = torch.zeros_like(weight)
        watch = Stopwatch(clock)
        if config.extras.ptx_coef:
            loss = update.demonstration_loss(task.learner.forward, next(task.ptx_batches(0)))
            task.accelerator.backward(0 * loss)
        update.optimizer_step(task.learner, config.max_grad_norm)
        watch.lap("optimizer")
        return watch.seconds["optimizer"]

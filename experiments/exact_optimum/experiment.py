"""One run: a world, PPO in it, and how much of the way from the reference to the exact optimum it went."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from experiments.exact_optimum import exact, tabular, transformer
from experiments.exact_optimum.exact import Outcome, World
from experiments.exact_optimum.faults import FAULTS

Env = Literal["A", "A-shared", "B"]
ENVS: tuple[Env, ...] = get_args(Env)


@dataclass(frozen=True)
class Settings:
    """Which world, and how PPO runs in it."""

    env: Env = "A"
    seed: int = 0
    """Of PPO's random numbers; the world stays."""
    beta: float = 0.5
    reward_seed: int | None = None
    """Another reference and reward table in A and A-shared, another reference in B."""
    updates: int = 150
    fault: str | None = None
    """A name of `faults.FAULTS`."""


@dataclass(frozen=True)
class Result:
    """What a run came to; every number is computed over all completions, none is sampled."""

    reference: Outcome
    trained: Outcome
    optimum: Outcome
    best: float
    """The largest J in reach: that of the optimum, or in A-shared that of the best policy which the table can be."""
    identity_error: float
    """|J* - J - beta KL(pi || pi*)|"""
    seconds: float

    @property
    def closed(self) -> float:
        """(J - J of the reference) / (best J - J of the reference): 0 where training started, 1 at the optimum."""
        start = self.reference.objective
        return (self.trained.objective - start) / (self.best - start)


def run(settings: Settings) -> Result:
    """Train in one world and compare with the optimum."""
    started = time.perf_counter()
    world, best, logprobs = (_train_transformer if settings.env == "B" else _train_table)(settings)
    beta = settings.beta
    return Result(
        reference=exact.outcome(world, world.reference, beta),
        trained=exact.outcome(world, logprobs.sum(1), beta),
        optimum=exact.outcome(world, world.optimum(beta), beta),
        best=best,
        identity_error=exact.identity_error(world, logprobs, beta),
        seconds=time.perf_counter() - started,
    )


def _train_table(settings: Settings) -> tuple[World, float, Tensor]:
    shared, beta = settings.env == "A-shared", settings.beta
    world, reference = tabular.world(settings.reward_seed)
    with FAULTS[settings.fault](beta) if settings.fault else nullcontext():
        table = tabular.train(world, reference, beta=beta, seed=settings.seed, shared=shared, updates=settings.updates)
    best = tabular.best_shared(world, reference, beta=beta) if shared else world.value_of_optimum(beta)
    return world, best, exact.logprobs_of(table, world.sequences)


def _train_transformer(settings: Settings) -> tuple[World, float, Tensor]:
    reference = transformer.reference(settings.reward_seed or 0)
    world = transformer.world(reference)
    with FAULTS[settings.fault](settings.beta) if settings.fault else nullcontext():
        policy = transformer.train(
            copy.deepcopy(reference), beta=settings.beta, seed=settings.seed, updates=settings.updates
        )
    logprobs = exact.logprobs_of(transformer.as_token_model(policy), world.sequences)
    return world, world.value_of_optimum(settings.beta), logprobs

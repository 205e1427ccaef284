"""Worlds A and A-shared: a policy that is a table of logits, trained by the project's own rollout and update.

A has a row of logits for each of the 156 prefixes and can be any policy. A-shared adds one and the same vector to every
row of the reference, so that what one prefix learns moves all others: there a wrong weight of long against short
completions does not cancel (mean over tokens: all of the gap; mean over sequences: nine tenths).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.exact_optimum import exact
from experiments.exact_optimum.exact import EOS, World
from rlhf import ops
from rlhf.actor_critic import TokenOutputs
from rlhf.generation import Generated, plain
from rlhf.learner import Learner
from rlhf.rollout import Shaping, collect
from rlhf.sequences import Sequences
from rlhf.types import Prompt, RewardFn
from rlhf.update import UpdateSettings, update

VOCABULARY, MAX_TOKENS = 6, 4
BATCH_SIZE, MICRO_BATCH_SIZE, LEARNING_RATE = 1024, 512, 0.05
PROMPT = [0]
"""A dummy: the table does not look at it."""


class Rows(nn.Module):
    """Logits of the reference plus a learned shift: (S, V) for a policy that can be anything, (V,) for a shared one."""

    def __init__(self, reference: Tensor, *, shared: bool):
        super().__init__()
        self.reference = nn.Buffer(reference)
        self.shift = nn.Parameter(torch.zeros_like(reference[0] if shared else reference))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (..., V) after the prefixes with these row numbers."""
        return (self.reference + self.shift)[rows]


class Table(nn.Module):
    """A `TokenModel` without a network: a row of logits and a value for each prefix."""

    def __init__(self, reference: Tensor, *, shared: bool = False):
        super().__init__()
        self.policy = Rows(reference, shared=shared)
        self.value = nn.Embedding(len(reference), 1)
        nn.init.zeros_(self.value.weight)

    def forward(self, batch: Sequences, *, train_policy: bool = True) -> TokenOutputs:
        """See `rlhf.actor_critic.TokenModel`."""
        rows = rows_before(batch.completion_ids)
        logits = self.policy(rows) if train_policy else self.policy(rows).detach()
        return TokenOutputs(
            ops.token_logprobs(logits, batch.completion_ids),
            ops.entropy(logits.detach()),
            self.value(rows).squeeze(-1),
        )

    def policy_parameters(self) -> list[nn.Parameter]:
        """The shift."""
        return list(self.policy.parameters())

    def value_parameters(self) -> list[nn.Parameter]:
        """The values."""
        return list(self.value.parameters())


class TableEngine:
    """An `rlhf.generation.Engine` that reads the table."""

    def __init__(self, table: Table):
        self.table = table
        self.batch_size = BATCH_SIZE

    def sync(self) -> None:
        """Nothing to copy: the engine looks at the weights that are trained."""

    def rest(self) -> None:
        """Nothing to give up."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        generator: torch.Generator,
        **_: Any,
    ) -> list[Generated]:
        """See `Engine.generate`. Every row is drawn to its full length, and cut after its EOS."""
        device = self.table.policy.shift.device
        uniforms = torch.rand(len(prompts), max_tokens, generator=generator, dtype=torch.float64).to(device)
        tokens = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(prompts), max_tokens, device=device)
        for t in range(max_tokens):
            logits = self.table.policy(rows_before(tokens)[:, t])
            tokens[:, t], logprobs[:, t] = plain.sample(logits, uniforms[:, t], temperature=temperature)
        return [_cut(ids, of_ids) for ids, of_ids in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def _cut(ids: list[int], logprobs: list[float]) -> Generated:
    end = ids.index(EOS) + 1 if EOS in ids else len(ids)
    return Generated(ids[:end], logprobs[:end], finished=EOS in ids)


def rows_before(tokens: Tensor) -> Tensor:
    """(B, T) number, in the order of `exact.prefixes`, of the prefix that stands before each token.

    Row 0 is the empty prefix; what comes after EOS is some row that nobody reads.
    """
    children = VOCABULARY - 1
    rows, first = [torch.zeros_like(tokens[:, 0])], 0
    for t in range(tokens.shape[1] - 1):
        next_first = first + children**t
        rows.append(next_first + (rows[-1] - first) * children + tokens[:, t].clamp(min=1) - 1)
        first = next_first
    return torch.stack(rows, dim=1)


# ---------------------------------------------------------------- the worlds


def world(reward_seed: int | None = None) -> tuple[World, Tensor]:
    """World A and the logits (S, V) of its reference; with a seed, another reference and a random score for each."""
    random = np.random.default_rng(reward_seed or 0)
    logits = random.normal(0, 1, (len(exact.prefixes(VOCABULARY, MAX_TOKENS)), VOCABULARY))
    logits[:, EOS] += 0.3
    found = exact.completions(VOCABULARY, MAX_TOKENS)
    drawn = random.normal(0, 1, len(found)) if reward_seed is not None else [score_of_a(ids) for ids in found]
    scores = [score if ids[-1] == EOS else -1.0 for ids, score in zip(found, drawn, strict=True)]
    sequences = exact.all_sequences(VOCABULARY, MAX_TOKENS, prompt=PROMPT, pad=EOS)
    reference = torch.from_numpy(logits)
    return World(sequences, torch.tensor(scores).double(), exact.logprobs_of(Table(reference), sequences)), reference


def score_of_a(ids: Sequence[int]) -> float:
    """World A's reward of a finished completion: ones are good, twos are bad, and so are more than two tokens."""
    length = len(ids) - 1
    return ids.count(1) - 0.5 * ids.count(2) + (0.3 * length if length <= 2 else 0.0)


def best_shared(world: World, reference: Tensor, *, beta: float) -> float:
    """The largest J that a shared shift can reach, by gradient ascent on J itself."""
    table = Table(reference, shared=True)
    optimizer = torch.optim.LBFGS(table.policy_parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def negative_objective() -> Tensor:
        optimizer.zero_grad()
        logprobs = ops.masked(table(world.sequences).logprobs, world.sequences.completion_mask)
        loss = -exact.shaped_objective(world, logprobs, beta)
        loss.backward()
        return loss.detach()

    optimizer.step(negative_objective)  # pyright: ignore[reportArgumentType]
    return -float(negative_objective())


# ---------------------------------------------------------------- training


def train(
    world: World,
    reference: Tensor,
    *,
    beta: float,
    seed: int,
    shared: bool = False,
    updates: int = 150,
    watch: Callable[[int, Table], None] = lambda step, table: None,
) -> Table:
    """Run PPO with the product's own parts. `watch` sees the table before the first update and after each."""
    accelerator = Accelerator(mixed_precision="no")
    reference = reference.float().to(accelerator.device)
    table, ref_table = (Table(reference, shared=kind).to(accelerator.device) for kind in (shared, False))
    learner = Learner(
        table,
        learning_rate=LEARNING_RATE,
        value_learning_rate=LEARNING_RATE,
        steps=updates,
        accelerator=accelerator,
    )
    settings = UpdateSettings(
        num_ppo_epochs=4,
        num_mini_batches=1,
        micro_batch_size=MICRO_BATCH_SIZE,
        cliprange=0.2,
        cliprange_value=None,
        vf_coef=1.0,
        max_grad_norm=1.0,
    )
    generator = torch.Generator().manual_seed(seed)
    reward = reward_of(world)
    watch(0, table)
    for step in range(updates):
        batch = collect(
            prompts=["-"] * BATCH_SIZE,
            prompt_ids=[PROMPT] * BATCH_SIZE,
            engine=TableEngine(table),
            decode=spell,
            reward=reward,
            model=learner.forward,
            ref_model=ref_table,
            shaping=Shaping(kl_coef=beta),
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            micro_batch_size=MICRO_BATCH_SIZE,
            pad_token_id=EOS,
            generator=generator,
            device=accelerator.device,
        )
        update(learner, batch, settings=settings, generator=generator)
        learner.schedule.step()
        watch(step + 1, table)
    return table


def reward_of(world: World) -> RewardFn:
    """The world's scores as a reward function on text; the text shows EOS, as a cut completion scores less."""
    found = exact.completions(VOCABULARY, MAX_TOKENS)
    scores = dict(zip(map(spell, found), world.scores.tolist(), strict=True))

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return [scores[completion] for completion in completions]

    return reward


def spell(ids: Sequence[int]) -> str:
    """A completion as text."""
    return " ".join(map(str, ids))

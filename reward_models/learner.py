"""What reward training changes from step to step, and how it is written down so that resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from reward_models.evaluation import Scored
from reward_models.losses import beats, bradley_terry_loss, centering_loss, plackett_luce_loss, soft_pair_loss
from reward_models.model import scores_of, sequence_scores
from reward_models.preferences import EncodedRanking, tie_strength
from rlhf import checkpoint, models
from rlhf.checkpoint import Checkpoint
from rlhf.config import RewardConfig
from rlhf.out_of_memory import Halving
from rlhf.progress import OnProgress, ignore
from rlhf.sequences import pad_rows
from rlhf.trunk import StateFile
from rlhf.types import UserError

Objective = Callable[[Tensor, Tensor], Tensor]
"""(scores (B, K), ranks (B, K)) -> (B,)"""
SoftPairs = tuple[tuple[int, int, float, float], ...]
"""(i, j, probability that i beats j, weight) of one prompt."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step saw, before it changed the weights."""

    loss: float
    """Mean per ranking."""
    accuracy: float
    """Share of the batch's strict pairs that the scores ordered right; NaN where it has none."""
    grad_norm: float
    learning_rate: float


class Learner:
    """A classifier with its optimiser and schedule. Dropout stays off: the same text always has the same score."""

    def __init__(
        self,
        config: RewardConfig,
        classifier: Any,
        rankings: Sequence[EncodedRanking],
        *,
        pad: int,
        states: StateFile | None = None,
    ) -> None:
        """`states`: what the frozen lower layers make of every row that will be seen, where they are frozen."""
        self.config, self.classifier, self.rankings, self.pad = config, classifier.eval(), rankings, pad
        self.states = states
        self.dtype = models.compute_dtype(config.precision, next(classifier.parameters()).device)
        self.halving = Halving("micro_batch_size", config.micro_batch_size, stage="reward", unit="ranking")
        self.objective = objective(config, rankings)
        self.soft = any(each.soft for each in rankings)  # of the whole training, not of a micro-batch
        self.weights = models.trainable_parameters(classifier)
        self.total = max(round(config.epochs * len(rankings)), 1)
        self.steps = math.ceil(self.total / config.batch_size)
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        warmup = round(config.warmup_share * self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(warmup_then_linear, warmup=warmup, steps=self.steps)
        )

    def step(self, number: int) -> Step:
        """Optimiser step `number` (from 0). Raises UserError where the loss or its gradient is not finite."""
        batch = self.batch(number)
        micro_batches = torch.arange(len(batch)).split(self.config.micro_batch_size)
        total, right, pairs = self.halving.in_parts(micro_batches, partial(self._gradients, batch))
        norm = clip_grad_norm_(self.weights.values(), self.config.max_grad_norm).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise UserError(f"training diverged at step {number + 1}: lower learning_rate, or set precision: fp32")
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        return Step(total / len(batch), right / pairs if pairs else math.nan, norm, learning_rate)

    def _gradients(self, batch: Sequence[EncodedRanking], parts: Sequence[Tensor]) -> tuple[float, int, int]:
        """Gradients of the batch's mean loss, by parts; returns the sum, the strict pairs ordered right, and all."""
        total, right, pairs = 0.0, 0, 0
        self.optimizer.zero_grad(set_to_none=True)
        for rows in parts:
            part = [batch[i] for i in rows.tolist()]
            scores, ranks = ranked_scores(self.classifier, part, pad=self.pad, dtype=self.dtype, states=self.states)
            losses = self._losses(scores, ranks, [_of_ranked(encoded) for encoded in part])
            (losses.sum() / len(batch)).backward()
            total += losses.sum().item()
            ordered = beats(ranks)
            right += int((scores[:, :, None] > scores[:, None, :])[ordered].sum())
            pairs += int(ordered.sum())
        return total, right, pairs

    def _losses(self, scores: Tensor, ranks: Tensor, soft: Sequence[SoftPairs]) -> Tensor:
        """(B,): the objective, or where labels are soft their cross-entropy. All of a training are of one kind."""
        if not self.soft:
            return self.objective(scores, ranks)
        probability, weight = soft_targets(soft, scores)
        centering = self.config.center_coef * centering_loss(scores, ranks)
        return soft_pair_loss(scores, probability, weight) + centering

    def batch(self, number: int) -> list[EncodedRanking]:
        """The rankings of a step: each once an epoch, every epoch in another order. Like lengths stand together."""
        count, size = len(self.rankings), self.config.batch_size
        wanted = range(number * size, min((number + 1) * size, self.total))
        orders = {epoch: self._order(epoch) for epoch in {position // count for position in wanted}}
        chosen = [self.rankings[orders[position // count][position % count]] for position in wanted]
        return sorted(chosen, key=lambda encoded: max(map(len, encoded.rows)))

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(checkpoint.seed_of(self.config.seed, "rankings", epoch))
        return torch.randperm(len(self.rankings), generator=generator).tolist()

    def score(self, rankings: Sequence[EncodedRanking], on_progress: OnProgress = ignore) -> list[Scored]:
        """Raw scores of every completion of these rankings. Raises UserError where they are not finite."""
        scores = self.scores([row for encoded in rankings for row in encoded.rows], on_progress)
        if not scores.isfinite().all():
            raise UserError("training diverged, the model's scores are not finite: lower learning_rate")
        flat = scores.split([len(encoded.rows) for encoded in rankings])
        return [
            Scored(encoded.ranking, tuple(scores.tolist()), encoded.lengths, encoded.soft)
            for encoded, scores in zip(rankings, flat, strict=True)
        ]

    def scores(self, rows: Sequence[Sequence[int]], on_progress: OnProgress = ignore) -> Tensor:
        """(N,) raw scores."""
        return scores_of(
            self.classifier,
            rows,
            pad=self.pad,
            dtype=self.dtype,
            batch_size=32,
            on_progress=on_progress,
            states=self.states,
        )

    def loss(self, held_out: Sequence[Scored]) -> float:
        """Mean objective of rankings that were scored."""
        scores = pad_sequence([torch.tensor(each.scores) for each in held_out], batch_first=True)
        ranks = pad_rows([[rank or 0 for rank in each.ranking.ranks] for each in held_out], pad=0, side="right")
        return self._losses(scores, ranks, [each.soft for each in held_out]).mean().item()

    def save(self, folder: Path, step: int, **numbers: Any) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        states = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": checkpoint.random_states(),
        }
        checkpoint.save(folder, step, weights={"reward": self.weights}, states=states, numbers=numbers)

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint."""
        with torch.no_grad():
            for name, tensor in saved.weights("reward").items():
                self.weights[name].copy_(tensor)
        states = saved.states()
        self.optimizer.load_state_dict(states["optimizer"])
        self.schedule.load_state_dict(states["schedule"])
        checkpoint.restore_random_states(states["random"])
        checkpoint.remove_others(saved.path)


def soft_targets(soft: Sequence[SoftPairs], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and weight (B, K, K) of every pair, weight 0 where there is no label; K is that of `scores`."""
    size = scores.shape[1]
    probability, weight = scores.new_zeros((2, len(soft), size, size), dtype=torch.float32)
    for row, pairs in enumerate(soft):
        for i, j, chance, heavy in pairs:
            probability[row, i, j], weight[row, i, j] = chance, heavy
    return probability, weight


def _of_ranked(encoded: EncodedRanking) -> SoftPairs:
    """Its soft labels by place among the ranked completions, which are those that are forwarded."""
    place = {i: number for number, i in enumerate(encoded.ranked)}
    return tuple((place[i], place[j], chance, weight) for i, j, chance, weight in encoded.soft)


def objective(config: RewardConfig, rankings: Sequence[EncodedRanking]) -> Objective:
    """The configured loss of a ranking, centring included. Ties of Bradley-Terry are Davidson's, nu from the data."""
    smoothing = config.label_smoothing
    if config.loss == "bradley_terry":
        loss = partial(bradley_terry_loss, tie_strength=tie_strength(rankings), label_smoothing=smoothing)
    else:
        loss = partial(plackett_luce_loss, label_smoothing=smoothing)
    return lambda scores, ranks: loss(scores, ranks) + config.center_coef * centering_loss(scores, ranks)


def ranked_scores(
    classifier: Any,
    batch: Sequence[EncodedRanking],
    *,
    pad: int,
    dtype: torch.dtype,
    states: StateFile | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and ranks (B, K) of the ranked completions; rank 0 fills rankings of fewer."""
    rows = [e.rows[i] for e in batch for i in e.ranked]
    flat = sequence_scores(classifier, rows, pad=pad, dtype=dtype, states=states)
    scores = pad_sequence(list(flat.split([len(e.ranked) for e in batch])), batch_first=True)
    ranks = pad_rows([[e.ranking.ranks[i] or 0 for i in e.ranked] for e in batch], pad=0, side="right")
    return scores, ranks.to(scores.device)


def warmup_then_linear(step: int, *, warmup: int, steps: int) -> float:
    """Factor of the learning rate at a step: up over `warmup` steps, then down to 0 at the end."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(steps - step, 0) / max(steps - warmup, 1)

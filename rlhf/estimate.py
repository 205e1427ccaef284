"""What a PPO run will take on this machine, from a probe of some seconds that uses the very parts of a run.

`run` is the command `rlhf ppo --estimate`; `estimate` takes objects, as `ppo.train` does. Nothing of it is kept.
Sampling is timed on real prompts; rollout and update on a few rows with completions of the lengths that were sampled.
Steps are then made up with the run's own prompts, and cost what the pieces did (`rlhf.rates`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rlhf import checkpoint, models, ppo
from rlhf.actor_critic import ValueHead, ValueModel
from rlhf.config import PPOConfig
from rlhf.contract import Contract
from rlhf.estimate_report import NEARLY_ALL, Completions, Estimate, Lasting, Memory, Part
from rlhf.flops import Decoder, Fed, Layers, of_whole
from rlhf.gauge import Gauge
from rlhf.generation import Generated
from rlhf.generation.native import NativeEngine
from rlhf.probe import Budget, Sampling, Training, cached
from rlhf.progress import say
from rlhf.rates import Rates
from rlhf.types import ConfigError, Prompt, RewardFn, TrunkReward
from rlhf.workload import Lengths, Row, decoded, decoding, forwarding, micro_batches, total

PROBE_SECONDS = 20.0
FOR_SAMPLING = 0.4
"""Share of them."""
MADE_UP = 8
"""Steps whose prompts and lengths are gone through; their mean is told."""
WRITTEN = 64 * 2**20
"""Bytes that are written to see how long a checkpoint takes."""


def run(
    config: PPOConfig, *, load_reward: Callable[[str, Contract], RewardFn], seconds: float = PROBE_SECONDS
) -> Estimate:
    """The estimate for a config alone. Raises what `ppo.run` would."""
    return estimate(config, **ppo.loaded(config, load_reward=load_reward), seconds=seconds)


def estimate(
    config: PPOConfig,
    *,
    policy: Any,
    tokenizer: Any,
    reward: RewardFn,
    prompts: Sequence[Prompt],
    value: ValueHead | ValueModel | None = None,
    seconds: float = PROBE_SECONDS,
) -> Estimate:
    """What `ppo.train` with the same arguments will take, from a probe of about so many seconds.

    The objects are used up: their weights may have changed. Raises what `ppo.train` would for what it is given, and
    ConfigError among several processes.
    """
    started = time.perf_counter()
    task = ppo.Task(config, policy=policy, tokenizer=tokenizer, reward=reward, prompts=prompts, value=value)
    if task.accelerator.num_processes > 1:
        raise ConfigError("--estimate looks at one process: run it without a launcher")
    say(f"ppo: a probe of about {seconds:.0f} s, of which nothing is kept")
    gauge = Gauge(task.accelerator.device)
    probed = _probe(task, gauge, seconds)
    return probed.estimate(available=gauge.available(), save_seconds=_save_seconds(task), started=started)


def _probe(task: ppo.Task, gauge: Gauge, seconds: float) -> _Probed:
    config, count = task.config, len(task.prompt_ids)
    sampling = Sampling(
        engine=task.engine,
        prompts=[task.prompt_ids[i] for i in ppo.prompt_indices(count, 0, count, seed=config.seed)],
        limit=config.max_completion_tokens,
        together=min(config.rollout_batch_size, config.batch_size),
        refills=isinstance(task.engine, NativeEngine),
        temperature=config.temperature,
        gauge=gauge,
    )
    decoder = Decoder.of(task.learner.model.policy, trunk_depth=task.trunk.depth if task.trunk else 0)
    sampling.run(Budget(FOR_SAMPLING * seconds, time.perf_counter), enough=config.batch_size)
    lengths = Lengths.of(sampling.completions, limit=config.max_completion_tokens)
    eos = task.tokenizer.eos_token_id
    training = Training(task, _middle(config, lengths, task.prompt_ids, sampling.completions, eos), gauge)
    training.run(Budget((1 - FOR_SAMPLING) * seconds, time.perf_counter))
    return _Probed(task, decoder, lengths, sampling, training)


def _middle(
    config: PPOConfig, lengths: Lengths, prompt_ids: Sequence[Sequence[int]], sampled: Sequence[Generated], eos: int
) -> list[Generated]:
    """Completions for the micro-batch in which half of a batch's tokens are reached, neighbours in length.

    They are pieces of those that were sampled: a reward that reads text is given text.
    """
    drawn = sorted(lengths.draw(config.batch_size, torch.Generator().manual_seed(config.seed)))
    size = config.micro_batch_size
    if config.micro_batch_tokens is not None:
        size = int(config.micro_batch_tokens / (fmean(map(len, prompt_ids)) + lengths.mean))
    count = max(size, config.extras.rloo_samples or 1)
    reached = torch.tensor(drawn).cumsum(0)
    count = min(count, len(drawn))
    start = min(int((reached < reached[-1] / 2).sum()) // count * count, len(drawn) - count)
    text = [token for each in sampled for token in (each.ids[:-1] if each.finished else each.ids)] or [eos]
    found: list[Generated] = []
    for number, length in enumerate(drawn[start : start + count]):
        ids = [text[(number * length + place) % len(text)] for place in range(length)]
        finished = length < lengths.limit
        found.append(Generated([*ids[:-1], eos] if finished else ids, [0.0] * length, finished))
    return found


@dataclass(frozen=True)
class _Probed:
    """What the probe has found, and what it means for whole steps."""

    task: ppo.Task
    decoder: Decoder
    lengths: Lengths
    sampling: Sampling
    training: Training

    def estimate(self, *, available: float, save_seconds: float, started: float) -> Estimate:
        """All of it together."""
        config, sampled = self.task.config, self.sampling.completions
        steps = config.total_episodes // config.batch_size
        at_end = float(self.lengths.longer[-1])
        return Estimate(
            config=config,
            parts=(self._sample(), self._score(), self._measure(), self._update()),
            lasting=Lasting(
                steps=steps,
                value_only_steps=min(config.value_warmup_steps, steps) if self.training.has_warm_up else 0,
                value_only_update_seconds=self._value_only(),
                saves=-(-steps // config.save_every),
                save_seconds=save_seconds,
            ),
            memory=self._memory(available),
            completions=Completions(
                mean_tokens=self.lengths.mean,
                cut=at_end if self.sampling.seen_tokens < self.lengths.limit else _share_cut(sampled, self.lengths),
                sampled=len(sampled),
                seen_tokens=self.sampling.seen_tokens,
            ),
            probe_seconds=time.perf_counter() - started,
        )

    @cached_property
    def batches(self) -> list[list[Row]]:
        """The rows of some steps of the run, with made-up lengths."""
        config, generator = self.task.config, torch.Generator().manual_seed(self.task.config.seed)
        samples = config.extras.rloo_samples or 1
        found: list[list[Row]] = []
        for step in range(min(MADE_UP, config.total_episodes // config.batch_size)):
            chosen = ppo.prompt_indices(len(self.task.prompts), step, config.batch_size // samples, seed=config.seed)
            prompts = [len(self.task.prompt_ids[index]) for index in chosen for _ in range(samples)]
            drawn = self.lengths.draw(len(prompts), generator)
            new = [i % samples == 0 for i in range(len(prompts))]
            found.append([Row(*row) for row in zip(prompts, drawn, new, strict=True)])
        return found

    @cached_property
    def micro_batches(self) -> list[list[Fed]]:
        """The same as they are forwarded."""
        config = self.task.config
        return [
            micro_batches(
                rows,
                config.micro_batch_size,
                tokens=config.micro_batch_tokens,
                num_mini_batches=config.num_mini_batches,
            )
            for rows in self.batches
        ]

    @cached_property
    def fed(self) -> Fed:
        """Of a step, forwarded once."""
        whole = total([total(parts) for parts in self.micro_batches])
        return whole.times(1 / len(self.micro_batches))

    def _sample(self) -> Part:
        how = {"together": self.task.config.rollout_batch_size, "refills": self.sampling.refills}
        rates = Rates.fit(self.sampling.pieces)
        fed = total([decoded(rows, **how) for rows in self.batches]).times(1 / len(self.batches))
        seconds = fmean(rates.cost(decoding(rows, **how)) for rows in self.batches)
        return Part("sample", fed.tokens, self.decoder.sampling(fed), seconds + self.sampling.sync_seconds)

    def _score(self) -> Part:
        classifier = getattr(self.task.reward, "classifier", None)
        if classifier is None or not isinstance(self.task.reward, TrunkReward):
            return Part("score", 0.0, 0.0, self._seconds("score"))
        depth = self.task.trunk.depth if self.task.trunk and self.task.trunk_reward else 0
        layers = Layers.of(classifier, models.layers_of(classifier)[1][depth:])
        return Part("score", self.fed.tokens, layers.forward(self.fed), self._seconds("score"))

    def _measure(self) -> Part:
        passes = 3 if self.task.trunk else 2
        flops = self.decoder.trunk.forward(self.fed) if self.task.trunk else 0.0
        flops += 2 * self.decoder.forward(self.fed) + self._critic(backward=False)
        return Part("measure", passes * self.fed.tokens, flops, self._seconds("measure"))

    def _update(self) -> Part:
        config = self.task.config
        once = self.decoder.forward(self.fed) + self.decoder.backward(self.fed) + self._critic(backward=True)
        groups = fmean(min(config.num_mini_batches, len(parts)) for parts in self.micro_batches)
        seconds = self._seconds("update") + groups * self.training.optimizer_seconds
        epochs = config.num_ppo_epochs
        return Part("update", epochs * self.fed.tokens, epochs * once, epochs * seconds)

    def _value_only(self) -> float:
        """Seconds of an update that trains the value only."""
        return self.task.config.num_ppo_epochs * self._seconds("value_only")

    def _critic(self, *, backward: bool) -> float:
        """FLOPs of a critic of its own."""
        value = self.task.learner.model.value
        if not isinstance(value, ValueModel):
            return 0.0
        layers = of_whole(value.backbone)
        return layers.forward(self.fed) + (layers.backward(self.fed) if backward else 0.0)

    def _seconds(self, part: str) -> float:
        """Of forwarding a step once in this part; the reward is called once for all micro-batches."""
        pieces = self.training.pieces.get(part)
        if not pieces:
            return 0.0
        rates = Rates.fit(pieces)
        calls = {"calls": 1} if part == "score" else {}
        return fmean(rates.cost({**forwarding(parts), **calls}) for parts in self.micro_batches)

    def _memory(self, available: float) -> Memory:
        config, task, live = self.task.config, self.task, self.training.live
        widest = max(part.tokens for parts in self.micro_batches for part in parts)
        longest = max(map(len, task.prompt_ids)) + config.max_completion_tokens
        of_sampling, of_update = Rates.fit(self.sampling.weights), Rates.fit(self.training.weights)
        rollout = self._trunk_states()
        room = NEARLY_ALL * available - live

        def fitting(rates: Rates, room: float, most: int) -> int:
            row = rates.cost({"tokens": longest})
            return max(0, min(most, int((room - rates.cost({"once": 1})) / row) if row else most))

        together = [_together(rows, config.rollout_batch_size) for rows in self.batches]
        return Memory(
            sampling=live + max(of_sampling.cost(work) for rows in together for work in map(cached, rows)),
            update=live + rollout + of_update.cost({"once": 1, "tokens": widest}),
            available=available,
            largest_micro_batch_size=fitting(of_update, room - rollout, config.batch_size // config.num_mini_batches),
            largest_rollout_batch_size=fitting(of_sampling, room, config.batch_size),
            longest_tokens=longest,
        )

    def _trunk_states(self) -> float:
        """Bytes of what the frozen layers make of a whole batch, kept for the update."""
        if self.task.trunk is None:
            return 0.0
        width = self.task.learner.model.policy.get_output_embeddings().weight.shape[1]
        longest = max(max(r.prompt for r in rows) + max(r.completion for r in rows) for rows in self.batches)
        return float(longest * self.task.config.batch_size * width * torch.float32.itemsize)  # autocast keeps fp32


def _together(rows: Sequence[Row], size: int) -> Iterable[list[Row]]:
    """The rows that are decoded together, see `workload.decoding`."""
    ordered = sorted(rows, key=lambda row: -row.prompt)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _share_cut(sampled: Sequence[Generated], lengths: Lengths) -> float:
    """Of completions that were sampled to the limit."""
    at_end = [each.finished for each in sampled if len(each.ids) == lengths.limit]
    return float(lengths.longer[-1]) * (1 - fmean(at_end)) if at_end else 0.0


def _save_seconds(task: ppo.Task) -> float:
    """Seconds of a checkpoint (weights, moving average, Adam's two moments), from a piece where the run will write."""
    learner = task.learner
    policy, value = (sum(w.nbytes for w in weights) for weights in _trained(learner.model))
    whole = policy * (4 if learner.ema else 3) + value * 3
    blank = torch.zeros(max(1, min(whole, WRITTEN)) // 4 + 1)
    beside = next(each for each in Path(task.config.output).absolute().parents if each.is_dir())
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        started = time.perf_counter()
        checkpoint.save(Path(folder), 0, weights={"policy": {"piece": blank}}, states={}, numbers={})
        return (time.perf_counter() - started) * max(1.0, whole / blank.nbytes)


def _trained(model: Any) -> tuple[list[Any], list[Any]]:
    return model.policy_parameters(), model.value_parameters()

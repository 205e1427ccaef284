"""What a PPO run will take, and how it is shown: a table with advice for people, one JSON object for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.config import Lora, PPOConfig
from rlhf.progress import duration

NEARLY_ALL = 0.9
"""Share of the memory that a run should not exceed: an estimate may be wrong."""


@dataclass(frozen=True)
class Part:
    """One part of a PPO step."""

    name: str
    tokens: float
    """That go through a model in a step, padding and repetitions included."""
    flops: float
    seconds: float

    @property
    def rate(self) -> float:
        """FLOPs per second."""
        return self.flops / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes, of the process on a CPU and of what torch allocates on a GPU."""

    sampling: float
    """The most while completions are sampled."""
    update: float
    """The most while policy and reference measure, and the update learns."""
    available: float
    largest_micro_batch_size: int
    """That fits, with prompts and completions as long as they may be; 0 where not even 1 does."""
    largest_rollout_batch_size: int
    longest_tokens: int
    """Of a prompt with its completion, at most."""

    def micro_batch(self, config: PPOConfig) -> tuple[str, int, int]:
        """The setting that bounds micro-batches, its value, and the largest that fits."""
        if config.micro_batch_tokens is None:
            return "micro_batch_size", config.micro_batch_size, self.largest_micro_batch_size
        return "micro_batch_tokens", config.micro_batch_tokens, self.largest_micro_batch_size * self.longest_tokens

    @property
    def peak(self) -> float:
        """Of the whole run."""
        return max(self.sampling, self.update)


@dataclass(frozen=True)
class Lasting:
    """How long a run is, in steps and what is done now and then."""

    steps: int
    value_only_steps: int
    """Of these, the first ones that train the value only."""
    value_only_update_seconds: float
    saves: int
    """Checkpoints that are written."""
    save_seconds: float


@dataclass(frozen=True)
class Completions:
    """What the policy writes before it is trained; it may write longer or shorter ones later."""

    mean_tokens: float
    cut: float
    """Share that does not end before the limit."""
    sampled: int
    """How many were looked at."""
    seen_tokens: int
    """Up to which length; what is beyond was extrapolated."""


@dataclass(frozen=True)
class Estimate:
    """What a run of this config will take on this machine, as a short probe foretells it."""

    config: PPOConfig
    parts: tuple[Part, ...]
    """Of a step that trains the policy."""
    lasting: Lasting
    memory: Memory
    completions: Completions
    probe_seconds: float

    @property
    def step_seconds(self) -> float:
        """Of a step that trains the policy."""
        return sum(part.seconds for part in self.parts)

    @property
    def total_seconds(self) -> float:
        """Of the run, from its first step to its last checkpoint."""
        lasting = self.lasting
        saved = self.part("update").seconds - lasting.value_only_update_seconds
        steps = lasting.steps * self.step_seconds - lasting.value_only_steps * saved
        return steps + lasting.saves * lasting.save_seconds

    def part(self, name: str) -> Part:
        """The part of this name."""
        return next(part for part in self.parts if part.name == name)

    def to_json(self) -> str:
        """The estimate as one JSON object."""
        whole = {
            "step_seconds": self.step_seconds,
            "total_seconds": self.total_seconds,
            "peak_bytes": self.memory.peak,
            **asdict(self),
            "advice": advice(self),
        }
        return json.dumps(whole, ensure_ascii=False)

    def print(self, console: Any) -> None:
        """Write table, whole and advice to a rich console."""
        console.print(self._table())
        for line in (*whole(self), *advice(self)):
            console.print(line, soft_wrap=True, markup=False)

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title="One PPO step", box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("part")
        for name in ("tokens", "TFLOP", "seconds", "share", "GFLOP/s"):
            table.add_column(name, justify="right")
        for part in self.parts:
            table.add_row(*_cells(part, self.step_seconds))
        step = Part("step", sum(p.tokens for p in self.parts), sum(p.flops for p in self.parts), self.step_seconds)
        table.add_section()
        table.add_row(*_cells(step, self.step_seconds))
        return table


def whole(estimate: Estimate) -> list[str]:
    """The run in a few lines."""
    lasting, memory, seen = estimate.lasting, estimate.memory, estimate.completions
    name, _, largest = memory.micro_batch(estimate.config)
    lines = [
        f"The run: {lasting.steps} steps, {duration(estimate.total_seconds)}, of which "
        f"{duration(lasting.saves * lasting.save_seconds)} for {lasting.saves} checkpoints.",
        f"Memory: {_gigabytes(memory.peak)} at the peak, of {_gigabytes(memory.available)} that can be had.",
        f"Largest that fits: {name} {largest}, rollout_batch_size {memory.largest_rollout_batch_size}.",
        f"Completions: {seen.mean_tokens:.0f} tokens on average, {seen.cut:.0%} cut at "
        f"{estimate.config.max_completion_tokens}, from {seen.sampled} that the policy wrote before training.",
    ]
    if seen.seen_tokens < estimate.config.max_completion_tokens:
        lines.append(f"There was no time for more than {seen.seen_tokens} tokens of each: the rest is extrapolated.")
    return lines


def advice(estimate: Estimate) -> list[str]:
    """What dominates, and what could be changed."""
    most = max(estimate.parts, key=lambda part: part.seconds)
    share = most.seconds / estimate.step_seconds
    return [
        f"{MEANING[most.name]} takes {share:.0%} of the time. {_to_save(estimate, most.name)}",
        _of_memory(estimate),
    ]


MEANING = {
    "sample": "Sampling completions",
    "score": "The reward",
    "measure": "Measuring logprobs with policy and reference",
    "update": "The update",
}


def _to_save(estimate: Estimate, part: str) -> str:
    config, largest = estimate.config, estimate.memory.largest_rollout_batch_size
    if part == "sample" and config.rollout_batch_size < largest:
        return f"Decode more rows together: rollout_batch_size {largest} fits."
    if part == "sample":
        return "Shorter completions (max_completion_tokens) are what makes it shorter."
    if part == "score":
        return (
            "A faster reward would make it shorter: a reward model with the policy's frozen lower layers shares them."
        )
    fewer = "Shorter completions (max_completion_tokens) make it shorter"
    if config.trainable == "full" or config.trainable == "lora" or isinstance(config.trainable, Lora):
        fewer = "With trainable: {last_layers: n} the layers below run once only"
    if part == "update" and config.num_ppo_epochs > 1:
        return f"{fewer}; num_ppo_epochs {config.num_ppo_epochs - 1} would save one pass of {config.num_ppo_epochs}."
    return f"{fewer}."


def _of_memory(estimate: Estimate) -> str:
    config, memory = estimate.config, estimate.memory
    if memory.peak <= NEARLY_ALL * memory.available:
        return "The memory is enough."
    name, now, largest = memory.micro_batch(config)
    if memory.sampling > memory.update:
        name, now, largest = "rollout_batch_size", config.rollout_batch_size, memory.largest_rollout_batch_size
    if 1 <= largest < now:
        return f"The memory is NOT enough, or nearly not: lower {name} from {now} to {largest}."
    return (
        "The memory is NOT enough, or nearly not, at any micro_batch_size: train fewer weights (trainable: "
        "{last_layers: n}, lora), or take a smaller model."
    )


def _cells(part: Part, whole: float) -> tuple[str, ...]:
    share = part.seconds / whole if whole else 0.0
    tflop, rate = f"{part.flops / 1e12:.3g}", f"{part.rate / 1e9:.0f}"
    return part.name, f"{part.tokens:,.0f}", tflop, f"{part.seconds:.3g}", f"{share:.0%}", rate


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

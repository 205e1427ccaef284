"""Sampling: K completions of every prompt into the label store, each with the model, seed and settings that made it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf import data, models, text
from rlhf.checkpoint import seed_of
from rlhf.config import SampleConfig, needed
from rlhf.generation import Engine
from rlhf.generation.choice import engine_for
from rlhf.progress import progress, say
from rlhf.report_data import Fact, ReportData, write_report_data
from rlhf.stopping import stop_request
from rlhf.store import Store
from rlhf.tracking import Tracker
from rlhf.types import Completion, DataError, Prompt, prompt_text


@dataclass(frozen=True)
class SampleResult:
    """What a run put into the store."""

    store: str
    prompts: int
    completions: int


def run(config: SampleConfig) -> SampleResult:
    """The stage behind `rlhf sample`. Prompts that the store already holds completions of are not sampled again."""
    source = needed(config.model, "model", "the policy to sample from")
    prompts = choose_prompts(
        needed(config.prompts, "prompts", "the prompts to sample"),
        config.columns,
        split=config.split,
        held_out=config.held_out,
        count=config.num_prompts,
        seed=config.seed,
    )
    tokenizer = models.load_tokenizer(source)
    policy = models.load_policy(source, tokenizer).to(models.device())
    ids, kept = text.encode_prompts(tokenizer, prompts, max_tokens=config.max_prompt_tokens)
    if len(kept) < len(prompts):
        say(f"sample: {len(prompts) - len(kept)} prompts are longer than max_prompt_tokens: left out")
    models.check_context(policy, max(map(len, ids)) + config.max_completion_tokens, "a prompt with its completion")
    engine = sampler(policy, tokenizer, precision=config.precision, batch_size=config.batch_size)
    store = Store(config.store)
    try:
        return _fill(config, store, engine, tokenizer, [prompts[i] for i in kept], ids)
    finally:
        store.close()


def choose_prompts(
    source: str,
    columns: dict[str, str],
    *,
    split: Literal["train", "held_out", "all"],
    held_out: float,
    count: int | None,
    seed: int,
) -> list[Prompt]:
    """Distinct prompts of one side of the split, at most `count` of them, drawn with the seed."""
    prompts = data.distinct(data.read_prompts(source, columns))
    training, kept_out = data.split(prompts, held_out, key=lambda prompt: prompt)
    chosen = {"train": training, "held_out": kept_out, "all": prompts}[split]
    if not chosen:
        raise DataError(
            f"{source} has {len(prompts)} prompts and none on the side {split!r} of the split (held_out = {held_out}): "
            f"add prompts or change held_out"
        )
    if count is None or count >= len(chosen):
        return chosen
    return random.Random(seed_of(seed, "prompts")).sample(chosen, count)


def sampler(policy: Any, tokenizer: Any, *, precision: Any, batch_size: int) -> Engine:
    """The engine for a policy that stays as it is."""
    return engine_for(
        policy.to(models.device()),
        eos_token_ids=models.eos_token_ids(policy, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        dtype=models.compute_dtype(precision, models.device()),
        batch_size=batch_size,
    )


def _fill(
    config: SampleConfig,
    store: Store,
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
) -> SampleResult:
    """Sample and store in chunks. A chunk's random numbers depend on its place alone: a resumed run is the same.

    What the store holds already goes into the record like what is sampled now: it is the record of all of it.
    """
    count = config.completions_per_prompt
    size = max(1, config.batch_size // count)
    stored = {data.prompt_key(item.prompt): item.completions for item in store.items(config.round)}
    keys = [data.prompt_key(prompt) for prompt in prompts]
    finished = total = 0
    with (
        Tracker(Path(config.output), stage="sample", config=config, tracking=config.tracking) as tracker,
        progress("sample", total=len(prompts)) as bar,
        stop_request() as stop,  # of Ctrl-C while a connection closes, SQLAlchemy would make a traceback, or nothing
    ):
        for start in range(0, len(prompts), size):
            stop.heed("what was sampled is in the store: run it again to go on")
            chunk = range(start, min(start + size, len(prompts)))
            if any(keys[i] not in stored for i in chunk):
                seed = seed_of(config.seed, "sample", config.round, start)
                sampled = engine.generate(
                    [ids[i] for i in chunk for _ in range(count)],
                    max_tokens=config.max_completion_tokens,
                    temperature=config.temperature,
                    generator=torch.Generator().manual_seed(seed),
                )
                completions = tuple(_completion(config, tokenizer, s, seed) for s in sampled)
                for place, i in enumerate(chunk):
                    if keys[i] not in stored:
                        stored[keys[i]] = completions[place * count : (place + 1) * count]
                        store.add_completions(prompts[i], stored[keys[i]], config.round)
                bar.advance(0, tokens=sum(len(s.ids) for s in sampled) / len(sampled))
            kept = [completion for i in chunk for completion in stored[keys[i]]]
            finished, total = finished + sum(c.finished for c in kept), total + len(kept)
            bar.advance(len(chunk), eos=finished / total)
            rows = [(prompt_text(prompts[start]), c.text, c.finished) for c in stored[keys[start]]]
            tracker.table("samples", ("prompt", "completion", "finished"), rows, step=start)
        tracker.summary({"prompts": len(prompts), "completions_per_prompt": count, "eos_rate": finished / total})
        write_report_data(Path(config.output), _report_data(config, len(prompts), total, finished))
    return SampleResult(config.store, len(prompts), len(prompts) * count)


def _report_data(config: SampleConfig, prompts: int, sampled: int, finished: int) -> ReportData:
    """The run in one sentence."""
    count = config.completions_per_prompt
    ended = f"; {100 * finished / sampled:.0f} % of them ended by themselves" if sampled else ""
    facts = (
        Fact("Prompts", prompts),
        Fact("Completions per prompt", count),
        Fact("Ended by itself, share", finished / sampled if sampled else None, note=f"of {sampled}"),
        Fact("Longest allowed, tokens", config.max_completion_tokens),
    )
    return ReportData(
        title="Sampling",
        verdict=f"{prompts * count:,} completions for people to rank, {count} for each of {prompts} prompts{ended}.",
        facts=facts,
    )


def _completion(config: SampleConfig, tokenizer: Any, sampled: Any, seed: int) -> Completion:
    settings = {"temperature": config.temperature, "max_completion_tokens": config.max_completion_tokens}
    return Completion(
        text=text.decode_completion(tokenizer, sampled.ids),
        model=str(config.model),
        seed=seed,
        settings=settings,
        finished=sampled.finished,
    )

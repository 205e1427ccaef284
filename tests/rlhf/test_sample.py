"""Sampling into the store: K completions a prompt with what made them, the same again after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import models, sample, text
from rlhf.config import SampleConfig
from rlhf.generation.native import NativeEngine
from rlhf.generation.plain import PlainEngine
from rlhf.store import Item, Store
from rlhf.types import ConfigError, DataError
from tests.rlhf import ppo_world as world


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", [*world.TEXTS, world.TEXTS[0]])


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def config(folder: Path, prompts: Path, output: Path, **changes: Any) -> SampleConfig:
    wanted: dict[str, Any] = {
        "model": str(folder),
        "prompts": str(prompts),
        "store": str(output / "labels.db"),
        "output": str(output / "sample"),
        "completions_per_prompt": 3,
        "max_completion_tokens": 6,
        "batch_size": 6,
        "temperature": 0.8,
        "precision": "fp32",
        "tracking": world.OFF,
    }
    return SampleConfig(**(wanted | changes))


def stored(given: SampleConfig, round: int | None = None) -> list[Item]:
    store = Store(given.store)
    try:
        return store.items(round)
    finally:
        store.close()


def test_every_distinct_prompt_has_its_completions_with_what_made_them(
    tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    given = config(tiny_model_folder, prompts, tmp_path, round=2)
    result = sample.run(given)
    items = stored(given)
    assert sorted(str(item.prompt) for item in items) == sorted(world.TEXTS)
    assert (result.prompts, result.completions) == (6, 18)
    for item in items:
        assert item.round == 2
        assert len(item.completions) == 3
        for completion in item.completions:
            assert completion.model == str(tiny_model_folder)
            assert completion.settings == {"temperature": 0.8, "max_completion_tokens": 6}
            assert completion.seed > 0
    assert len({completion.text for item in items for completion in item.completions}) > 12


def test_the_texts_are_what_the_engine_draws_at_that_temperature_from_that_seed(
    tiny_model_folder: Path, tiny_tokenizer: Any, prompts: Path, tmp_path: Path
) -> None:
    given = config(tiny_model_folder, prompts, tmp_path)
    sample.run(given)
    policy = models.load_policy(str(tiny_model_folder), tiny_tokenizer)
    engine = PlainEngine(policy, eos_token_ids=(1,), pad_token_id=0, dtype=torch.float32, batch_size=6)
    items = stored(given)
    ids = [tiny_tokenizer(item.prompt).input_ids for item in items[2:4] for _ in range(3)]
    seed = items[2].completions[0].seed
    drawn = engine.generate(ids, max_tokens=6, temperature=0.8, generator=torch.Generator().manual_seed(seed))
    texts = [text.decode_completion(tiny_tokenizer, one.ids) for one in drawn]
    assert [c.text for item in items[2:4] for c in item.completions] == texts
    assert [c.finished for item in items[2:4] for c in item.completions] == [one.finished for one in drawn]


def test_a_second_run_changes_nothing_and_samples_nothing(
    tiny_model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tiny_model_folder, prompts, tmp_path)
    sample.run(given)
    before = stored(given)
    monkeypatch.setattr(NativeEngine, "generate", lambda *_, **__: pytest.fail("nothing is left to sample"))
    result = sample.run(given)
    assert stored(given) == before
    assert (result.prompts, result.completions) == (6, 18)


@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_interrupted_run_goes_on_to_the_same_store(
    after: int, tiny_model_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between two prompts of a chunk, or between two chunks."""
    plain = Store.add_completions
    calls = iter(range(100))

    def break_off(self: Store, *arguments: Any) -> int:
        if next(calls) == after:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    broken, whole = (config(tiny_model_folder, prompts, tmp_path / name, round=0) for name in ("broken", "whole"))
    for given in (broken, whole):
        Path(given.store).parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_completions", break_off)
        with pytest.raises(KeyboardInterrupt):
            sample.run(broken)
    assert len(stored(broken)) == after
    sample.run(broken)
    sample.run(whole)
    assert stored(broken) == stored(whole)
    for record in ("samples.jsonl", "summary.json"):
        ours, theirs = (Path(given.output) / record for given in (broken, whole))
        assert ours.read_text() == theirs.read_text(), "what was sampled before the interruption is in it too"


def test_more_prompts_add_theirs_and_leave_the_others_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Though the new prompt shares its chunk with old ones, those are not sampled a second time."""
    few = write(tmp_path / "few.jsonl", world.TEXTS[:3])
    many = write(tmp_path / "many.jsonl", ["it is warm", *world.TEXTS])
    given = config(tiny_model_folder, few, tmp_path)
    sample.run(given)
    before = stored(given)
    sample.run(config(tiny_model_folder, many, tmp_path))
    after = stored(given)
    assert after[:3] == before
    assert sorted(str(item.prompt) for item in after) == sorted(["it is warm", *world.TEXTS])


def test_rounds_are_apart_and_draw_other_texts(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    for round in (0, 1):
        sample.run(config(tiny_model_folder, prompts, tmp_path, round=round))
    given = config(tiny_model_folder, prompts, tmp_path)
    first, second = (stored(given, round) for round in (0, 1))
    assert [item.prompt for item in first] == [item.prompt for item in second]
    assert [item.completions for item in first] != [item.completions for item in second]


def test_one_side_of_the_split_and_at_most_so_many(prompts: Path) -> None:
    def choose(split: Any, held_out: float, count: int | None = None, seed: int = 0) -> list[Any]:
        return sample.choose_prompts(str(prompts), {}, split=split, held_out=held_out, count=count, seed=seed)

    train, held_out = choose("train", 0.5), choose("held_out", 0.5)
    assert sorted(train + held_out) == sorted(world.TEXTS) == sorted(choose("all", 0.5))
    assert train
    assert held_out
    few = choose("all", 0.0, count=2)
    assert len(few) == 2
    assert few == choose("all", 0.0, count=2)
    assert len({tuple(choose("all", 0.0, count=3, seed=seed)) for seed in range(8)}) > 1
    assert sorted(choose("all", 0.0, count=99)) == sorted(world.TEXTS)
    with pytest.raises(DataError, match=r"6 prompts and none on the side 'held_out' of the split \(held_out = 0.0\)"):
        choose("held_out", 0.0)


def test_what_is_missing_is_named_with_its_flag(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model"):
        sample.run(config(tiny_model_folder, prompts, tmp_path, model=None))
    with pytest.raises(ConfigError, match="--prompts"):
        sample.run(replace(config(tiny_model_folder, prompts, tmp_path), prompts=None))

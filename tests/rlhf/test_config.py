"""Configs: frozen, checked, and with errors that name the field and what it may be."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from rlhf import config
from rlhf.config import (
    EvaluateConfig,
    LabelConfig,
    LastLayers,
    Lora,
    PPOConfig,
    PPOExtras,
    RewardConfig,
    RunConfig,
    SampleConfig,
    SFTConfig,
    Simulation,
    needed,
)
from rlhf.types import ConfigError, UserError

STAGES = {name: type(getattr(RunConfig(), name)) for name in config.STAGES}


@pytest.mark.parametrize("stage", config.STAGES)
def test_every_stage_has_working_defaults_and_is_frozen(stage: str) -> None:
    made = STAGES[stage]()
    assert made.output == f"runs/default/{stage}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1
    assert hash(dataclasses.replace(made, seed=1).seed) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFTConfig(learning_rate=0), "learning_rate is 0, but it must be above 0"),
        (lambda: SFTConfig(held_out=1.0), "held_out is 1.0, but it must be a fraction: 0 or more, below 1"),
        (lambda: SFTConfig(epochs=0), "epochs is 0"),
        (lambda: SFTConfig(seed=-1), "seed is -1"),
        (lambda: SampleConfig(completions_per_prompt=1), "completions_per_prompt is 1, but it must be 2 to 9"),
        (lambda: SampleConfig(temperature=0), "temperature is 0"),
        (lambda: LabelConfig(port=0), "port is 0, but it must be 1 to 65535"),
        (lambda: Simulation(), "simulate.utility is '', but it must be written as module:function"),
        (lambda: Simulation("a:b", annotators=0), "simulate.annotators is 0, but it must be at least 1"),
        (lambda: RewardConfig(center_coef=-1), "center_coef is -1"),
        (lambda: LastLayers(0), "last_layers is 0, but it must be at least 1"),
        (lambda: Lora(lora_rank=0), "lora_rank is 0"),
        (lambda: PPOConfig(kl_coef=-0.1), "kl_coef is -0.1"),
        (lambda: PPOConfig(lam=1.5), "lam is 1.5, but it must be between 0 and 1"),
        (lambda: PPOConfig(batch_size=8192), "batch_size is 8192, but it must be at most total_episodes"),
        (
            lambda: PPOConfig(batch_size=32),
            "num_mini_batches is 4, but it must be 1 to batch_size / micro_batch_size = 32 / 16",
        ),
        (lambda: PPOConfig(extras=PPOExtras(rloo_samples=3)), "a multiple of extras.rloo_samples = 3"),
        (lambda: PPOExtras(dual_clip=1.0), "extras.dual_clip is 1.0, but it must be above 1"),
        (lambda: PPOExtras(ptx_coef=0.1), "extras.ptx_data is None, but it must be given with ptx_coef"),
        (lambda: EvaluateConfig(num_prompts=1), "num_prompts is 1"),
    ],
)
def test_impossible_values_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        make()
    assert isinstance(refused.value, UserError)
    assert isinstance(refused.value, ValueError)


def test_what_is_not_given_names_its_flag() -> None:
    assert needed("a.jsonl", "data", "data") == "a.jsonl"
    with pytest.raises(ConfigError, match=re.escape("the data is not given: pass --data or set `data:` in the YAML")):
        needed(None, "data", "the data")

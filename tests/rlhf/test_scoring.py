"""A reward model on the policy's own trunk gives the same scores from the trunk's states as from text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from reward_models.model import RewardModel, set_calibration
from rlhf import models, ppo
from rlhf.config import LastLayers, Trainable
from rlhf.contract import Contract
from rlhf.generation import Generated
from rlhf.rollout import with_trunk_states
from rlhf.scoring import Read
from rlhf.trunk import Trunk
from tests.rlhf import ppo_world as world

ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma2")
PROMPTS = ["the film is", "a dull , slow and", "It was", "one of the best"]
COMPLETIONS = [" good .", " boring film that you will forget", "", " clever ; the cast is great !"]


def contract_of(model: Any, tokenizer: Any) -> Contract:
    return models.model_contract(model, tokenizer, max_prompt_tokens=32, max_completion_tokens=16)


def reward_model(classifier: Any, tokenizer: Any, *, seed: int = 0) -> RewardModel:
    """As if its upper layers had been trained, and calibrated."""
    random = torch.Generator().manual_seed(seed)
    for weight in models.trainable_parameters(classifier).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=random)
    set_calibration(classifier, torch.tensor([0.3, -1.1, 2.0]))
    return RewardModel(classifier, tokenizer, contract=contract_of(classifier, tokenizer), precision="fp32")


@pytest.fixture
def pair(policy: Callable[..., Any], classifier: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """A policy and a reward model from one checkpoint, the same lower layers frozen in both."""

    def make(name: str, trainable: Trainable = LastLayers(1)) -> tuple[Any, RewardModel]:  # noqa: B008
        return policy(name, trainable), reward_model(classifier(name, trainable), tiny_tokenizer)

    return make


def test_what_the_contracts_decide(
    pair: Callable[..., Any], classifier: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    learner, reward = pair("llama")
    mine = contract_of(learner, tiny_tokenizer)
    assert reward.on_trunk(mine)
    assert not reward.on_trunk(replace(mine, trunk_hash="another"))
    assert not reward.on_trunk(replace(mine, tokenizer_hash="another"))
    assert not reward.on_trunk(replace(mine, trunk_hash=None, trunk_depth=0))
    deeper = reward_model(classifier("llama", LastLayers(2)), tiny_tokenizer)
    assert not deeper.on_trunk(mine)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_by_states_are_those_by_text(name: str, pair: Callable[..., Any], tiny_tokenizer: Any) -> None:
    learner, reward = pair(name)
    assert reward.on_trunk(contract_of(learner, tiny_tokenizer))
    rows = reward.rows(PROMPTS, COMPLETIONS)
    trunk = Trunk.of(learner, torch.float32)
    assert trunk is not None
    states = [trunk.states({"input_ids": torch.tensor([row])})[0] for row in rows]  # one by one: no padding at all
    found = reward.score_hidden(pad_sequence(states, batch_first=True), torch.tensor(list(map(len, rows))))
    by_text = torch.tensor(reward(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(found, by_text, rtol=1e-5, atol=1e-5)
    alone = [reward([prompt], [text])[0] for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(found, torch.tensor(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rollout_is_scored_as_its_texts_are(name: str, pair: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """Whether a completion ended, was cut off, or is no text that the tokenizer would write that way."""
    learner, reward = pair(name)
    reward.on_trunk(contract_of(learner, tiny_tokenizer))
    trunk = Trunk.of(learner, torch.float32)
    assert trunk is not None
    eos = tiny_tokenizer.eos_token_id
    prompts = ["the film is", "It was", "a dull", "the cast is great", "one"]
    ids = [tiny_tokenizer(prompt).input_ids for prompt in prompts]
    texts = [" good .", " boring film that you will forget", " b", " clever !", ""]
    tokens = [tiny_tokenizer(text).input_ids for text in texts]
    other = tiny_tokenizer.convert_tokens_to_ids(list("bad"))  # letter by letter
    assert tiny_tokenizer(tiny_tokenizer.decode(other)).input_ids != other or len(other) == 1
    sampled = [
        Generated([*tokens[0], eos], [0.0] * (len(tokens[0]) + 1), finished=True),
        Generated(tokens[1], [0.0] * len(tokens[1]), finished=False),  # the longest, and cut off
        Generated([*other, eos], [0.0] * 4, finished=True),
        Generated(tokens[3], [0.0] * len(tokens[3]), finished=False),
        Generated([eos], [0.0], finished=True),
    ]
    completions = [tiny_tokenizer.decode(each.ids, skip_special_tokens=True) for each in sampled]
    read = Read.of(reward, prompts, ids, completions, sampled)
    assert read.same == [True, True, False, True, True]
    batches = [torch.tensor([0, 2, 4]), torch.tensor([3, 1])]
    whole = with_trunk_states(trunk, read.sequences, batches)
    by_states = read.scored_by(reward, whole.trunk_states)(prompts, completions)
    assert by_states == pytest.approx(reward(prompts, completions), abs=1e-5)


def test_only_what_reads_otherwise_is_scored_by_text(pair: Callable[..., Any], tiny_tokenizer: Any) -> None:
    learner, reward = pair("llama")
    reward.on_trunk(contract_of(learner, tiny_tokenizer))
    trunk = Trunk.of(learner, torch.float32)
    assert trunk is not None
    asked: list[list[str]] = []

    class Counting:
        rows, score_hidden, on_trunk = reward.rows, reward.score_hidden, reward.on_trunk

        def __call__(self, prompts: Any, completions: Any) -> list[float]:
            asked.append(list(completions))
            return reward(prompts, completions)

    eos, other = tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids(list("bad"))
    good = tiny_tokenizer(" good").input_ids
    sampled = [Generated([*ids, eos], [0.0] * (len(ids) + 1), finished=True) for ids in (good, other)]
    ids = [tiny_tokenizer("It was").input_ids] * 2
    read = Read.of(reward, ["It was"] * 2, ids, [" good", "bad"], sampled)
    whole = with_trunk_states(trunk, read.sequences, [torch.arange(2)])
    read.scored_by(Counting(), whole.trunk_states)(["It was"] * 2, [" good", "bad"])
    assert asked == [["bad"]]


def test_ppo_with_a_shared_trunk_is_ppo_by_text(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Scores differ in the last bits of fp32, by another order of padding, and all that follows hardly more."""
    handed: list[int] = []
    score_hidden = RewardModel.score_hidden
    monkeypatch.setattr(
        RewardModel,
        "score_hidden",
        lambda self, hidden, lengths: handed.append(len(hidden)) or score_hidden(self, hidden, lengths),
    )
    results = {}
    for way in ("states", "text"):
        learner, reward = pair("llama")
        scorer = reward if way == "states" else lambda prompts, completions, by=reward: by(prompts, completions)
        config = world.config(tmp_path / way)
        ppo.train(config, policy=learner, tokenizer=tiny_tokenizer, reward=scorer, prompts=world.TEXTS)
        results[way] = world.records(tmp_path / way)
        if way == "states":
            assert sum(handed) > 0
    for one, other in zip(results["states"], results["text"], strict=True):
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-3, abs=1e-4), name

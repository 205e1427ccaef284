"""The reward model gives the score that plain transformers gives, for every technique, and through its folder."""

from __future__ import annotations

import json

import pytest
import torch

from reward_models.model import RewardModel, calibration, scores_of, sequence_scores, set_calibration, unwrapped
from rlhf import ppo
from rlhf.config import LastLayers
from rlhf.models import (
    choose_trainable,
    frozen_copy,
    load_classifier,
    load_policy,
    load_tokenizer,
    model_contract,
    save_model,
    trainable_parameters,
)
from rlhf.text import encode_completion, encode_prompt
from rlhf.types import ContractError, DataError, RewardFn
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

PROMPTS = ["the film is", "a dull , slow and", "It was", "one of the best"]
COMPLETIONS = [
    " good and funny .",
    " boring film that you will forget before the end .",
    "",
    " clever ; the cast is great !",
]
TECHNIQUES = ["full", "lora", "head", LastLayers(1)]


@pytest.fixture
def tokenizer(tiny_model_folder):
    return load_tokenizer(str(tiny_model_folder))


def classifier_of(folder, tokenizer, trainable=None, seed=3):
    return load_classifier(str(folder), tokenizer, trainable=trainable, seed=seed)


def rows_of(tokenizer, prompts=PROMPTS, completions=COMPLETIONS):
    return [
        encode_prompt(tokenizer, p) + encode_completion(tokenizer, c) for p, c in zip(prompts, completions, strict=True)
    ]


def trained_a_little(classifier, rows, pad):
    """Some optimiser steps on an arbitrary target, so that every trained weight (a LoRA's too) has moved."""
    optimiser = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (
            sequence_scores(classifier, rows, pad=pad, dtype=torch.float32) * torch.tensor([1.0, -1, 2, -2])
        ).sum().backward()
        optimiser.step()
    return classifier


def saved(classifier, tokenizer, folder):
    contract = model_contract(classifier, tokenizer, max_prompt_tokens=64, max_completion_tokens=64)
    save_model(classifier, tokenizer, folder, contract=contract)
    return folder


def plain_scores(folder, rows):
    """What transformers alone makes of the folder, one row at a time: no padding, none of our code."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


@pytest.mark.parametrize("trainable", TECHNIQUES, ids=str)
def test_folder_gives_the_same_scores_with_and_without_this_project(tiny_model_folder, tokenizer, tmp_path, trainable):
    rows = rows_of(tokenizer)
    classifier = classifier_of(tiny_model_folder, tokenizer, trainable)
    untrained = scores_of(classifier, rows, pad=tokenizer.pad_token_id, dtype=torch.float32, batch_size=4)
    trained_a_little(classifier, rows, tokenizer.pad_token_id)
    trained = scores_of(classifier, rows, pad=tokenizer.pad_token_id, dtype=torch.float32, batch_size=4)
    set_calibration(classifier, trained)
    folder = saved(classifier, tokenizer, tmp_path / "model")
    again = RewardModel.load(folder, precision="fp32")

    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(again.raw_scores(PROMPTS, COMPLETIONS), trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain_scores(folder, rows), trained, atol=1e-4, rtol=0)
    assert (again.score_mean, again.score_std) == calibration(classifier)


def test_the_head_reloads_bit_for_bit(tiny_model_folder, tokenizer, tmp_path):
    for trainable in TECHNIQUES:
        classifier = classifier_of(tiny_model_folder, tokenizer, trainable)
        trained_a_little(classifier, rows_of(tokenizer), tokenizer.pad_token_id)
        folder = saved(classifier, tokenizer, tmp_path / str(trainable))
        mine = unwrapped(classifier).score
        mine = mine.modules_to_save.default if hasattr(mine, "modules_to_save") else mine
        assert torch.equal(classifier_of(folder, tokenizer).score.weight, mine.weight)


@pytest.mark.parametrize("second", ["lora", "full"])
def test_a_reward_model_can_be_trained_further(tiny_model_folder, tokenizer, tmp_path, second):
    """Two rounds of an adapter: the second folder holds what both have learned."""
    rows, pad = rows_of(tokenizer), tokenizer.pad_token_id
    first = trained_a_little(classifier_of(tiny_model_folder, tokenizer, "lora"), rows, pad)
    folder = saved(first, tokenizer, tmp_path / "first")
    classifier = trained_a_little(classifier_of(folder, tokenizer, second), rows, pad)
    expected = scores_of(classifier, rows, pad=pad, dtype=torch.float32, batch_size=4)
    again = RewardModel.load(saved(classifier, tokenizer, tmp_path / "second"), precision="fp32")
    torch.testing.assert_close(again.raw_scores(PROMPTS, COMPLETIONS), expected, atol=1e-5, rtol=1e-5)


def test_score_does_not_depend_on_company_or_padding(tiny_model_folder, tokenizer):
    classifier, rows, pad = classifier_of(tiny_model_folder, tokenizer), rows_of(tokenizer), tokenizer.pad_token_id
    together = sequence_scores(classifier, rows, pad=pad, dtype=torch.float32)
    alone = torch.cat([sequence_scores(classifier, [row], pad=pad, dtype=torch.float32) for row in rows])
    in_pairs = scores_of(classifier, rows, pad=pad, dtype=torch.float32, batch_size=2)
    other_pad = sequence_scores(classifier, rows, pad=rows[0][0], dtype=torch.float32)
    for other in (alone, in_pairs, other_pad):
        torch.testing.assert_close(other, together, atol=1e-5, rtol=0)


def test_the_score_is_read_at_eos(tiny_model_folder, tokenizer):
    """A model whose head sees the last hidden state of the last token, EOS, and nothing after it."""
    classifier, row = classifier_of(tiny_model_folder, tokenizer), rows_of(tokenizer)[1]
    assert row[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    with torch.no_grad():
        hidden = classifier.model(torch.tensor([row])).last_hidden_state[0, -1]
        expected = (hidden * classifier.score.weight[0]).sum()
    found = sequence_scores(classifier, [row, row + row], pad=tokenizer.pad_token_id, dtype=torch.float32)[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_scores_stay_fine_grained_in_bf16(tiny_model_folder, tokenizer):
    classifier, rows = classifier_of(tiny_model_folder, tokenizer), rows_of(tokenizer)
    scores = sequence_scores(classifier, rows, pad=tokenizer.pad_token_id, dtype=torch.bfloat16)
    full = sequence_scores(classifier, rows, pad=tokenizer.pad_token_id, dtype=torch.float32)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, full, atol=0.05, rtol=0)


@pytest.mark.parametrize("trainable", TECHNIQUES, ids=str)
def test_gradient_reaches_exactly_what_is_trained(tiny_model_folder, tokenizer, trainable):
    classifier = classifier_of(tiny_model_folder, tokenizer, trainable)
    sequence_scores(classifier, rows_of(tokenizer), pad=tokenizer.pad_token_id, dtype=torch.float32).sum().backward()
    with_gradient = {name for name, p in classifier.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {name for name in trainable_parameters(classifier) if "lora_A" not in name}  # their B starts at 0
    assert any("score" in name for name in with_gradient)
    assert with_gradient == trained


def test_reward_is_calibrated_once_and_is_a_reward_function(tiny_model_folder, tokenizer, tmp_path):
    classifier = classifier_of(tiny_model_folder, tokenizer)
    assert calibration(classifier) == (0.0, 1.0)
    raw = RewardModel(classifier, tokenizer, precision="fp32").raw_scores(PROMPTS, COMPLETIONS)
    set_calibration(classifier, raw)
    folder = saved(classifier, tokenizer, tmp_path / "model")
    reward = RewardModel.load(folder, precision="fp32")
    scores = torch.tensor(reward(PROMPTS, COMPLETIONS))
    assert isinstance(reward, RewardFn)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert json.loads((folder / "config.json").read_text())["score_std"] == pytest.approx(raw.std(correction=0).item())


def test_long_completion_is_cut_as_in_training_and_keeps_eos(tiny_model_folder, tokenizer, tmp_path):
    classifier = classifier_of(tiny_model_folder, tokenizer)
    contract = model_contract(classifier, tokenizer, max_prompt_tokens=64, max_completion_tokens=4)
    reward = RewardModel(classifier, tokenizer, contract=contract, precision="fp32")
    row = encode_prompt(tokenizer, PROMPTS[0]) + tokenizer(COMPLETIONS[1]).input_ids[:3] + [tokenizer.eos_token_id]
    expected = sequence_scores(classifier, [row], pad=tokenizer.pad_token_id, dtype=torch.float32)
    assert reward.raw_scores(PROMPTS[:1], COMPLETIONS[1:2]).item() == pytest.approx(expected.item(), abs=1e-6)


def test_what_cannot_be_is_refused(tiny_model_folder, tiny_chat_model_folder, tokenizer):
    with pytest.raises(ContractError, match="is no reward model"):
        RewardModel.load(tiny_model_folder)
    reward = RewardModel(classifier_of(tiny_model_folder, tokenizer), tokenizer, precision="fp32")
    with pytest.raises(DataError, match="4 prompts for 1 completions"):
        reward(PROMPTS, COMPLETIONS[:1])
    assert reward([], []) == []
    with pytest.raises(DataError, match="of no use as a reward"):
        set_calibration(reward.classifier, torch.tensor([1.0, 1.0]))
    with pytest.raises(DataError, match="of no use as a reward"):
        set_calibration(reward.classifier, torch.tensor([1.0, torch.nan]))


def test_policy_with_another_template_is_refused(tiny_model_folder, tiny_chat_model_folder, tokenizer):
    def contract(folder):
        chat = load_tokenizer(str(folder))
        model = choose_trainable(classifier_of(folder, chat), None)
        return model_contract(model, chat, max_prompt_tokens=64, max_completion_tokens=64)

    mine, theirs = contract(tiny_model_folder), contract(tiny_chat_model_folder)
    reward = RewardModel(classifier_of(tiny_model_folder, tokenizer), tokenizer, contract=mine, precision="fp32")
    reward.check_policy(mine, name="runs/x/sft/model")
    with pytest.raises(ContractError, match="runs/x/sft/model share a tokenizer but not a chat template"):
        reward.check_policy(theirs, name="runs/x/sft/model")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_any_architecture_scores_as_transformers_does(tiny_tokenizer, tmp_path, name):
    tiny.build(name).save_pretrained(tmp_path / "policy")
    tiny_tokenizer.save_pretrained(tmp_path / "policy")
    tokenizer = load_tokenizer(str(tmp_path / "policy"))
    rows = rows_of(tokenizer)
    classifier = classifier_of(tmp_path / "policy", tokenizer, "full")
    expected = scores_of(classifier, rows, pad=tokenizer.pad_token_id, dtype=torch.float32, batch_size=4)
    folder = saved(classifier, tokenizer, tmp_path / "reward")
    assert expected.std() > 1e-3
    torch.testing.assert_close(plain_scores(folder, rows), expected, atol=1e-4, rtol=1e-4)
    again = RewardModel.load(folder, precision="fp32").raw_scores(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_stay_the_same_when_weights_are_shared(tiny_model_folder, tokenizer, tmp_path, precision):
    """With those of the policy that the reward model was trained from: to the bit, on its trunk too."""
    classifier = classifier_of(tiny_model_folder, tokenizer, LastLayers(1))
    trained_a_little(classifier, rows_of(tokenizer), tokenizer.pad_token_id)
    contract = model_contract(classifier, tokenizer, max_prompt_tokens=99, max_completion_tokens=99)
    save_model(classifier, tokenizer, tmp_path / "reward", contract=contract)
    kept = RewardModel(load_classifier(str(tmp_path / "reward"), tokenizer), tokenizer, precision=precision)
    loaded = RewardModel.load(tmp_path / "reward", precision=precision)
    policy = load_policy(str(tiny_model_folder), tokenizer, trainable=LastLayers(1))
    assert loaded(PROMPTS, COMPLETIONS) == kept(PROMPTS, COMPLETIONS)
    loaded.share_weights(frozen_copy(policy))
    assert loaded(PROMPTS, COMPLETIONS) == kept(PROMPTS, COMPLETIONS)
    lowest = loaded.classifier.model.layers[0].mlp.up_proj.weight
    assert lowest is policy.model.layers[0].mlp.up_proj.weight
    assert loaded.on_trunk(model_contract(policy, tokenizer, max_prompt_tokens=99, max_completion_tokens=99))
    assert loaded.classifier.score.weight.dtype == torch.float32


@pytest.mark.parametrize("trainable", ["full", LastLayers(1)], ids=str)
def test_a_reward_in_fp32_scores_beside_a_policy_in_bf16(tiny_model_folder, tokenizer, tmp_path, trainable):
    """What the reference gives up for bf16 must not be the reward model's."""
    classifier = trained_a_little(
        classifier_of(tiny_model_folder, tokenizer, LastLayers(1)), rows_of(tokenizer), tokenizer.pad_token_id
    )
    contract = model_contract(classifier, tokenizer, max_prompt_tokens=99, max_completion_tokens=99)
    save_model(classifier, tokenizer, tmp_path / "reward", contract=contract)
    reward = RewardModel.load(tmp_path / "reward", precision="fp32")
    before = reward(PROMPTS, COMPLETIONS)
    policy = load_policy(str(tiny_model_folder), tokenizer, trainable=trainable)
    config = world.config(tmp_path / "run", precision="bf16", trainable=trainable, total_episodes=8)
    ppo.train(config, policy=policy, tokenizer=tokenizer, reward=reward, prompts=world.TEXTS)
    assert reward(PROMPTS, COMPLETIONS) == before

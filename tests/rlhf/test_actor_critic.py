"""Policy and value in one forward: the same numbers and gradients as plain forwards of each sequence alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import models, ops
from rlhf.actor_critic import ActorCritic, ValueHead, ValueModel, passes_of
from rlhf.config import LastLayers
from rlhf.sequences import Sequences
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

NAMES = ["llama", "gpt2", "qwen3", "gemma2"]


@cache
def made(name: str) -> ActorCritic:
    return world.actor_critic(name, temperature=0.8)


def batch() -> Sequences:
    return Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)


def plain(model: ActorCritic, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropy and values of one sequence from transformers' own output: no padding, mask or position ids."""
    out = model.policy(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
    at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    logprobs = (out.logits[0, at] / model.temperature).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
    head = model.value.linear  # type: ignore[union-attr]
    values = out.hidden_states[-1][0, at] @ head.weight[0] + head.bias
    return chosen, -(logprobs.exp() * logprobs).sum(-1), values


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_gives_what_each_sequence_gives_alone(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        together = model(batch())
        for b, (prompt, completion) in enumerate(zip(world.PROMPTS, world.COMPLETIONS, strict=True)):
            alone = plain(model, prompt, completion)
            for kind, found, expected in zip(together._fields, together, alone, strict=True):
                torch.testing.assert_close(
                    found[b, : len(completion)], expected, rtol=1e-4, atol=3e-5, msg=lambda m, k=kind: f"{k}: {m}"
                )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("left", "right"), [(7, 0), (0, 5), (3, 2)])
def test_padding_of_any_content_side_and_amount_changes_nothing(name: str, left: int, right: int) -> None:
    prompt, completion = [5, 0, 9], [3, 0, 1]
    padded = Sequences(
        prompt_ids=torch.tensor([[17] * left + prompt]),
        prompt_lengths=torch.tensor([3]),
        completion_ids=torch.tensor([completion + [23] * right]),
        completion_lengths=torch.tensor([3]),
    )
    bare = Sequences.from_lists([prompt], [completion], pad=world.PAD)
    with torch.no_grad():
        for found, expected in zip(made(name)(padded), made(name)(bare), strict=True):
            torch.testing.assert_close(found[:, :3], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_plain_forwards(name: str) -> None:
    """Through `logits_to_keep` and the hook that reads the hidden states: into every weight, the value's part too."""
    model = copy.deepcopy(made(name))
    rows = batch()
    out = model(rows)
    torch.manual_seed(0)
    weights = ops.masked(torch.randn(out.logprobs.shape), rows.completion_mask)
    (ops.masked(out.logprobs + 0.3 * out.values, rows.completion_mask) * weights).sum().backward()
    found = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    for b, (prompt, completion) in enumerate(zip(world.PROMPTS, world.COMPLETIONS, strict=True)):
        logprobs, _, values = plain(model, prompt, completion)
        ((logprobs + 0.3 * values) * weights[b, : len(completion)]).sum().backward()
    for n, weight in model.named_parameters():
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(found[n], weight.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=n: f"{n}: {m}")


def test_the_logits_stay_as_the_model_gave_them() -> None:
    """They may be a view of something that still needs its gradient: nothing is divided or normalised in place."""
    whole = torch.randn(2, 4, 9, generator=world.seeded(), requires_grad=True)
    logits = (whole * 1.0)[:, 1:]
    before = logits.detach().clone()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = ops.token_logprobs(logits, tokens, temperature=0.5).sum() + ops.entropy(logits, temperature=0.5).sum()
    assert torch.equal(logits, before)
    out.backward()
    assert whole.grad is not None
    assert (whole.grad[:, 1:] != 0).any()
    assert (whole.grad[:, 0] == 0).all()


def test_the_entropy_carries_no_gradient_and_the_rest_does() -> None:
    out = copy.deepcopy(made("llama"))(batch())
    assert (out.logprobs.requires_grad, out.values.requires_grad) == (True, True)
    assert not out.entropy.requires_grad


def test_without_a_value_model_values_are_zero() -> None:
    out = world.actor_critic(value=False)(batch())
    assert (out.values == 0).all()
    assert not out.values.requires_grad


def test_a_new_value_head_says_zero_in_fp32_even_under_autocast() -> None:
    head = ValueHead(32)
    hidden = torch.randn(2, 3, 32, generator=world.seeded())
    assert (head(hidden) == 0).all()
    torch.nn.init.normal_(head.linear.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden.bfloat16())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, hidden.bfloat16().float() @ head.linear.weight[0], rtol=1e-6, atol=1e-6)


def test_in_bf16_logprobs_and_entropy_are_normalised_in_fp32() -> None:
    model = ActorCritic(tiny.build("llama"), ValueHead(32), temperature=1.0, dtype=torch.bfloat16)
    exact = world.actor_critic("llama", value=False)
    with torch.no_grad():
        rough, fine = model(batch()), exact(batch())
    assert {x.dtype for x in rough} == {torch.float32}
    mask = batch().completion_mask
    gap = (rough.logprobs - fine.logprobs)[mask]
    assert 0 < float(gap.abs().max()) < 0.2
    assert float(gap.mean().abs()) < 2e-2


def test_passes_between_two_steps_convert_the_weights_once() -> None:
    """Outputs and gradients are those of passes that convert them anew, and a later block sees the weights of then."""
    model = ActorCritic(tiny.build("llama"), ValueHead(32), temperature=1.0, dtype=torch.bfloat16)
    weight = model.policy.model.layers[0].mlp.up_proj.weight

    def passes(between: float = 0.0) -> list[Tensor]:
        outputs = []
        for _ in range(2):
            out = model(batch())
            outputs.append(out.logprobs.detach())
            (out.logprobs + out.values).sum().backward()
            weight.data += between
        return outputs

    def gradients() -> dict[str, Tensor]:
        found = {name: w.grad.clone() for name, w in model.named_parameters()}
        model.zero_grad()
        return found

    anew, expected = passes(), gradients()
    with passes_of(model):
        once, found = passes(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(anew, once, strict=True))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    with passes_of(model):
        first, second = passes(between=0.5)
    assert torch.equal(first, second), "it was converted a second time"
    assert not torch.equal(model(batch()).logprobs, second), "what was converted outlived the block"


def test_the_value_head_keeps_its_precision_backwards() -> None:
    """The block around several passes must not cast what it does not run."""
    model = ActorCritic(tiny.build("llama"), ValueHead(32), temperature=1.0, dtype=torch.bfloat16)
    with passes_of(model):
        made = torch.randn(3, 32, generator=world.seeded()) @ torch.randn(32, 5, generator=world.seeded(1))
    assert made.dtype == torch.float32


def test_weights_that_embedding_and_head_share_get_both_gradients() -> None:
    """The embedding's as rows only, which end in the head's: the same sum, and nothing sparse is left behind."""
    model = world.actor_critic("llama", tie_word_embeddings=True)
    embedding = model.policy.get_input_embeddings()
    assert embedding.weight is model.policy.lm_head.weight
    rows = batch()
    ops.masked(model(rows).logprobs, rows.completion_mask).sum().backward()
    found = embedding.weight.grad
    model.zero_grad()
    for prompt, completion in zip(world.PROMPTS, world.COMPLETIONS, strict=True):
        plain(model, prompt, completion)[0].sum().backward()
    assert (found.layout, embedding.sparse) == (torch.strided, False)
    torch.testing.assert_close(found, embedding.weight.grad, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- what is trained


def test_the_warm_up_sends_no_gradient_into_the_policy() -> None:
    model = copy.deepcopy(made("llama"))
    out = model(batch(), train_policy=False)
    assert not out.logprobs.requires_grad
    out.values.sum().backward()
    assert all(weight.grad is None for weight in model.policy.parameters())
    assert all(weight.grad is not None for weight in model.value_parameters())
    with torch.no_grad():
        for found, expected in zip(model(batch(), train_policy=False), model(batch()), strict=True):
            assert torch.equal(found, expected)


def test_the_module_is_in_evaluation_mode_dropout_included() -> None:
    policy = tiny.build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model = ActorCritic(policy, ValueHead(32), temperature=1.0, dtype=torch.float32)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(batch()).logprobs, model(batch()).logprobs)


@pytest.mark.parametrize("trainable", ["full", "lora", "head", LastLayers(1)])
def test_policy_and_value_parameters_are_what_is_trained(trainable: Any) -> None:
    policy = models.choose_trainable(tiny.build("llama"), trainable)
    model = ActorCritic(policy, ValueHead(32), temperature=1.0, dtype=torch.float32)
    wanted = [w for w in policy.parameters() if w.requires_grad]
    assert [id(w) for w in model.policy_parameters()] == [id(w) for w in wanted]
    assert len(model.value_parameters()) == 2
    out = model(batch())
    (out.logprobs.sum() + out.values.sum()).backward()
    lost = [w for w in (*wanted, *model.value_parameters()) if w.grad is None]
    assert not lost
    assert all(w.grad is None for w in policy.parameters() if not w.requires_grad)


def test_lora_has_the_same_hidden_states_and_logprobs_as_its_merged_model() -> None:
    policy = models.choose_trainable(tiny.build("llama"), "lora")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=world.seeded(3))
    head = world.actor_critic().value
    adapted = ActorCritic(policy, head, temperature=1.0, dtype=torch.float32)
    with torch.no_grad():
        found = adapted(batch())
        merged = ActorCritic(copy.deepcopy(policy).merge_and_unload(), head, temperature=1.0, dtype=torch.float32)
        expected = merged(batch())
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- a critic of its own


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_critic_from_a_reward_model_says_its_calibrated_score_at_eos(
    tiny_model_folder: Any, tiny_tokenizer: Any, trainable: Any
) -> None:
    classifier = models.load_classifier(str(tiny_model_folder), tiny_tokenizer, trainable=trainable, seed=3)
    inner = classifier.get_base_model() if hasattr(classifier, "peft_config") else classifier
    inner.config.score_mean, inner.config.score_std = 0.3, 2.5
    critic = ValueModel.from_classifier(classifier).eval()
    model = ActorCritic(tiny.build("llama"), critic, temperature=1.0, dtype=torch.float32)
    # the value before a token is read one place earlier: append one token, and the last value has read the EOS
    longer = [[*ids, 7] for ids in world.COMPLETIONS]
    with torch.no_grad():
        values = model(Sequences.from_lists(world.PROMPTS, longer, pad=world.PAD)).values
        for b, (prompt, completion) in enumerate(zip(world.PROMPTS, world.COMPLETIONS, strict=True)):
            raw = inner(input_ids=torch.tensor([prompt + completion]), attention_mask=None).logits
            hidden = inner.base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0, -1]
            score = float((inner.score(hidden) - 0.3) / 2.5)
            assert float(values[b, len(completion)]) == pytest.approx(score, abs=1e-5)
            if world.PAD not in completion[-1:]:
                assert float((raw - 0.3) / 2.5) == pytest.approx(score, abs=1e-5)


def test_training_a_critic_of_its_own_moves_no_policy(tiny_model_folder: Any, tiny_tokenizer: Any) -> None:
    classifier = models.load_classifier(str(tiny_model_folder), tiny_tokenizer, trainable="full")
    model = ActorCritic(
        tiny.build("llama"), ValueModel.from_classifier(classifier), temperature=1.0, dtype=torch.float32
    )
    model(batch()).values.sum().backward()
    assert all(weight.grad is None for weight in model.policy.parameters())
    moved = [weight for weight in model.value_parameters() if weight.grad is not None]
    assert len(moved) == len(model.value_parameters())

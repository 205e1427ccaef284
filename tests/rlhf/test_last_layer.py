"""The last layer at the read positions alone: the same hidden states and gradients, in less work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from reward_models.model import sequence_scores
from rlhf import attention, last_layer, models
from rlhf.actor_critic import ActorCritic, ValueHead, ValueModel
from rlhf.config import Lora
from rlhf.last_layer import last_layer_at
from rlhf.sequences import Sequences
from rlhf.trunk import Trunk
from tests.rlhf import tiny

NAMES = ("llama", "qwen3", "gemma2", "opt")
NORM = 1e-5
"""RMSNorm computes in fp32, in a model in fp64, too."""
PROMPTS = [[5, 9, 200, 7, 31, 8, 12, 13, 14], [77, 3], [40, 41, 42]]
COMPLETIONS = [[12, 300, 4], [9, 8, 7, 6, 5], [33]]
ROWS = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]


def model_of(name: str, *, own_attention: bool = False) -> Any:
    model = tiny.build(name).double()
    if not own_attention:
        attention.choose(model)
    return model


def inputs(*, padded: bool = True) -> dict[str, torch.Tensor]:
    if not padded:
        return {"input_ids": tiny.IDS, "attention_mask": torch.ones_like(tiny.IDS)}
    return Sequences.from_lists(PROMPTS, COMPLETIONS, pad=0).model_inputs()


def hidden_of(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.base_model(**given, use_cache=False).last_hidden_state


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def rows_of(module: torch.nn.Module) -> list[int]:
    """How many positions each call of a module gets from here on."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("name", "own_attention"), [*((name, False) for name in NAMES), ("llama", True), ("qwen3", True), ("opt", True)]
)
def test_the_last_positions_are_the_same_with_their_gradients(name: str, own_attention: bool, padded: bool) -> None:
    """In fp64 but for the norms; of rows padded on both sides, and of rows without padding, which need no mask."""
    model, given = model_of(name, own_attention=own_attention), inputs(padded=padded)
    seen = given["attention_mask"][:, -4:].bool()
    sound = hidden_of(model, given)[:, -4:][seen]
    with last_layer_at(model, 4) as is_narrow:
        found = hidden_of(model, given)
    assert is_narrow
    assert found.shape[1] == 4
    torch.testing.assert_close(found[seen], sound, rtol=1e-9, atol=1e-9)
    wanted, got = (gradients(model, each.square().sum()) for each in (sound, found[seen]))
    assert wanted.keys() == got.keys()
    for weight, gradient in wanted.items():
        torch.testing.assert_close(got[weight], gradient, rtol=NORM, atol=NORM, msg=weight)


@pytest.mark.parametrize("name", NAMES)
def test_one_position_of_each_row(name: str) -> None:
    model, given, ends = model_of(name), inputs(), torch.tensor([10, 9, 8])
    sound = hidden_of(model, given)[torch.arange(3), ends]
    with last_layer_at(model, ends) as is_narrow:
        found = hidden_of(model, given)
    assert is_narrow
    assert found.shape[:2] == (3, 1)
    torch.testing.assert_close(found[:, 0], sound, rtol=1e-9, atol=1e-9)
    wanted, got = (gradients(model, each.square().sum()) for each in (sound, found[:, 0]))
    for weight, gradient in wanted.items():
        torch.testing.assert_close(got[weight], gradient, rtol=NORM, atol=NORM, msg=weight)


def test_a_models_last_layer_is_itself_again_afterwards() -> None:
    model, given = model_of("llama"), inputs()
    before = hidden_of(model, given)
    with pytest.raises(KeyError), last_layer_at(model, 2):
        raise KeyError
    assert torch.equal(hidden_of(model, given), before)


def test_adapters_are_trained_in_the_last_layer_too() -> None:
    model = models.choose_trainable(tiny.build("llama"), Lora()).double()
    attention.choose(model)
    for weight in models.trainable_parameters(model).values():
        weight.data += 0.3 * torch.randn(weight.shape)
    base, given = model.get_base_model(), inputs()
    sound = hidden_of(base, given)[:, -3:]
    with last_layer_at(model, 3) as is_narrow:
        found = hidden_of(base, given)
    assert is_narrow
    wanted, got = (gradients(model, each.square().sum()) for each in (sound, found))
    assert any("layers.2" in weight for weight in wanted)
    for weight, gradient in wanted.items():
        torch.testing.assert_close(got[weight], gradient, rtol=NORM, atol=NORM, msg=weight)


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_another_architecture_runs_whole(name: str) -> None:
    """Their models give a layer what it needs by place, or make more of the layer's output than hidden states."""
    model, given = tiny.build(name), inputs()
    attention.choose(model)
    before = hidden_of(model, given)
    with last_layer_at(model, 2) as is_narrow:
        assert not is_narrow
        torch.testing.assert_close(hidden_of(model, given), before, rtol=0, atol=0, equal_nan=True)


def test_a_model_for_which_it_is_not_exact_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here what follows the layers mixes the positions of a row."""
    model, given = model_of("llama"), inputs()
    norm = type(model.base_model.norm).forward
    monkeypatch.setattr(
        model.base_model.norm, "forward", lambda x: norm(model.base_model.norm, x + x.mean(1, keepdim=True))
    )
    before = hidden_of(model, given)
    with last_layer_at(model, 2) as is_narrow:
        assert not is_narrow
        assert torch.equal(hidden_of(model, given), before)


def test_a_model_without_a_list_of_layers_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(model.config, "num_hidden_layers", 4)
    with last_layer_at(model, 2) as is_narrow:
        assert not is_narrow


def test_a_model_that_gives_no_numbers_runs_whole() -> None:
    """Gemma 2's own attention, over rows that are padded on the left."""
    with last_layer_at(model_of("gemma2", own_attention=True), 2) as is_narrow:
        assert not is_narrow


def test_a_layer_that_is_passed_through_stays_so() -> None:
    """The trunk may hold all layers: then none of them runs, the last one neither."""
    model, given = model_of("llama").requires_grad_(False), inputs()
    trunk = Trunk.of(model, torch.float64, depth=3)
    assert trunk is not None
    states = trunk.states(given)
    with trunk.handing_on(model, states), last_layer_at(model, 2) as is_narrow:
        found = hidden_of(model, given)
    assert not is_narrow
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(found[seen], hidden_of(model, given)[seen], rtol=1e-6, atol=1e-6)


def test_it_is_proven_on_the_whole_model_even_while_the_trunk_is_handed_on() -> None:
    model, given = model_of("llama").requires_grad_(False), inputs()
    trunk = Trunk.of(model, torch.float64, depth=2)
    assert trunk is not None
    sound, states = hidden_of(model, given)[:, -2:], trunk.states(given)
    with trunk.handing_on(model, states), last_layer_at(model, 2) as is_narrow:
        found = hidden_of(model, given)
    assert is_narrow
    seen = given["attention_mask"][:, -2:].bool()
    torch.testing.assert_close(found[seen], sound[seen], rtol=1e-6, atol=1e-6)


def test_a_vocabulary_of_a_few_tokens_is_enough() -> None:
    model = tiny.build("llama", vocab_size=4)
    attention.choose(model)
    with last_layer_at(model, 2) as is_narrow:
        assert is_narrow


def test_it_is_proven_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[Any] = []
    sound = last_layer._gap
    monkeypatch.setattr(last_layer, "_gap", lambda model: proofs.append(model) or sound(model))
    model = model_of("llama")
    for _ in range(3):
        with last_layer_at(model, 2):
            pass
    assert len(proofs) == 1


# ---------------------------------------------------------------- who reads so


def test_ppos_models_run_it_at_the_completions_alone() -> None:
    policy, classifier = tiny.build("llama"), tiny.build("llama", seed=1)
    critic = ValueModel(classifier.base_model, ValueHead(32))
    batch = Sequences.from_lists(PROMPTS, COMPLETIONS, pad=0)
    model = ActorCritic(policy, critic, temperature=1.0, dtype=torch.float32)
    model(batch)  # proven
    seen = [rows_of(each.base_model.layers[-1].mlp) for each in (policy, classifier)]
    below = rows_of(policy.base_model.layers[-2].mlp)
    model(batch)
    assert seen == [[3 * 5], [3 * 5]]
    assert below == [3 * 13]


def test_a_reward_model_runs_it_at_the_last_token_alone() -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny.config_of("llama", num_labels=1)
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    exact = copy.deepcopy(classifier).double()
    scores = sequence_scores(classifier, ROWS, pad=0, dtype=torch.float32)
    seen = rows_of(classifier.base_model.layers[-1].mlp)
    torch.testing.assert_close(sequence_scores(classifier, ROWS, pad=0, dtype=torch.float32), scores)
    assert seen == [3]
    one_by_one = [exact(input_ids=torch.tensor([row])).logits[0, 0] for row in ROWS]
    torch.testing.assert_close(scores.double(), torch.stack(one_by_one), rtol=1e-4, atol=1e-5)

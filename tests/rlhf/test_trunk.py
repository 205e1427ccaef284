"""The frozen lower layers, run once: the same numbers and gradients as running them each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import models, ops, ppo, rollout
from rlhf.actor_critic import ActorCritic, ValueHead
from rlhf.config import LastLayers, Trainable
from rlhf.sequences import Sequences
from rlhf.trunk import StateFile, Trunk
from tests.rlhf import ppo_world as world

NAMES = ("llama", "gpt2", "qwen3", "gemma2", "opt", "bloom")
KINDS: tuple[Trainable, ...] = (LastLayers(1), "head")


def ragged() -> Sequences:
    return Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)


def actor_critic(policy: Any, trunk: Trunk | None) -> ActorCritic:
    value = ValueHead(policy.get_output_embeddings().weight.shape[1])
    with torch.no_grad():
        value.linear.weight.copy_(torch.linspace(-1, 1, value.linear.in_features))
    return ActorCritic(policy, value, temperature=0.8, dtype=torch.float32, trunk=trunk)


def summed(model: ActorCritic, batch: Sequences, micro_batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a sum over all tokens, micro-batch by micro-batch."""
    model.zero_grad()
    for rows in micro_batches:
        part = batch.select(rows)
        out = model(part)
        (ops.masked(out.logprobs + out.values**2, part.completion_mask)).sum().backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_same_to_the_bit(name: str, kind: Trainable, policy: Callable[..., Any]) -> None:
    model = policy(name, kind)
    trunk = Trunk.of(model, torch.float32)
    assert trunk is not None
    assert trunk.depth == (len(models.layers_of(model)[1]) - 1 if isinstance(kind, LastLayers) else trunk.depth)
    plain, fast = ragged(), actor_critic(model, trunk)
    micro_batches = rollout.partition(plain, 3)
    batch = rollout.with_trunk_states(trunk, plain, micro_batches)
    for left, right in zip(
        rollout.measure(fast, batch, micro_batches), rollout.measure(fast, plain, micro_batches), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    gradients = summed(fast, batch, micro_batches)
    for key, gradient in summed(fast, plain, micro_batches).items():
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")
    assert gradients.keys() == models.trainable_parameters(fast).keys()


def test_the_states_take_the_place_of_the_lower_layers(policy: Callable[..., Any]) -> None:
    """Other states, other outputs; and no frozen layer is run."""
    model = policy("llama", LastLayers(1))
    trunk = Trunk.of(model, torch.float32)
    assert trunk is not None
    batch = rollout.with_trunk_states(trunk, ragged(), [torch.arange(len(world.PROMPTS))])
    assert batch.trunk_states is not None
    fast = actor_critic(model, trunk)
    right = fast(batch).logprobs
    runs: list[int] = []
    lowest: Any = models.layers_of(model)[1][0]
    with_hook = lowest.self_attn.register_forward_hook(lambda *_: runs.append(1))
    wrong = fast(replace(batch, trunk_states=-batch.trunk_states)).logprobs
    assert not runs
    with_hook.remove()
    assert float((right - wrong).detach().abs().max()) > 1e-3
    fast(ragged())  # the layers are back
    assert all("forward" not in vars(layer) for layer in models.layers_of(model)[1])


def test_the_reference_reads_the_same_states(policy: Callable[..., Any]) -> None:
    model = policy("llama", LastLayers(1))
    trunk = Trunk.of(model, torch.float32)
    assert trunk is not None
    reference = ActorCritic(models.frozen_copy(model), None, temperature=1.0, dtype=torch.float32, trunk=trunk)
    micro_batches = rollout.partition(ragged(), 2)
    batch = rollout.with_trunk_states(trunk, ragged(), micro_batches)
    before = rollout.measure(reference, ragged(), micro_batches).logprobs
    with torch.no_grad():
        for weight in models.trainable_parameters(model).values():
            weight.add_(1.0)
    torch.testing.assert_close(rollout.measure(reference, batch, micro_batches).logprobs, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_there_is_no_trunk_where_the_lowest_layer_is_trained(kind: Trainable, policy: Callable[..., Any]) -> None:
    assert Trunk.of(policy("llama", kind), torch.float32) is None


def test_a_model_whose_layers_cannot_be_passed_through_is_found(
    policy: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One that reads a lower layer's output beside the trunk's, as some architectures do."""
    model = policy("llama", LastLayers(1))
    layers: Any = models.layers_of(model)[1]
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.clear())
    layers[0].mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    layers[-1].register_forward_hook(lambda _, __, output: output + seen.pop() if seen else output)
    assert Trunk.of(model, torch.float32) is None
    assert "frozen layers of LlamaForCausalLM run anew each time" in capsys.readouterr().err


def test_states_in_a_file_are_those_of_the_rows_alone(policy: Callable[..., Any], tmp_path: Path) -> None:
    model = policy("llama", LastLayers(1))
    trunk = Trunk.of(model, torch.float32)
    assert trunk is not None
    rows = [(5, 6, 7), (8, 9), (5, 6, 7), (10, 11, 12, 13, 14), (15,)]
    done: list[int] = []
    kept = StateFile(tmp_path / "states.bin", trunk, rows, batch_size=2, on_progress=done.append)
    assert sum(done) == 4, "each once"
    chosen = [rows[3], rows[0], rows[4]]
    ids = torch.tensor([[10, 11, 12, 13, 14], [5, 6, 7, 0, 0], [15, 0, 0, 0, 0]])
    with kept.handing_on(model, chosen), torch.no_grad():
        together = model.base_model(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    for b, row in enumerate(chosen):
        alone = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(together[b, : len(row)], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError):
        kept.handing_on(model, [(1, 2)])
    assert (tmp_path / "states.bin").stat().st_size == (3 + 2 + 5 + 1) * 32 * 4
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_ppo_with_the_trunk_is_ppo_without_it(
    policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(Trunk, "of", staticmethod(lambda model, dtype: None))
        model = policy("llama", LastLayers(1))
        ppo.train(
            world.config(tmp_path / name),
            policy=model,
            tokenizer=tiny_tokenizer,
            reward=world.length_reward,
            prompts=world.TEXTS,
        )
    assert world.records(tmp_path / "with") == world.records(tmp_path / "without")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without"))
    for key, weight in one.items():
        torch.testing.assert_close(weight, two[key], rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")

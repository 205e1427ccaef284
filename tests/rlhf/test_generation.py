"""Each engine draws from softmax(logits / temperature), every row by itself, and changes nothing of the model."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rlhf import attention, models
from rlhf.generation import Engine, Generated
from rlhf.generation.native import NativeEngine
from rlhf.generation.packed import Packed
from rlhf.generation.plain import PlainEngine
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

NAMES = ["llama", "gpt2", "qwen3", "gemma2"]
VOCABULARY = 6
CHOSEN: dict[str, str] = {}
"""Which engine the tests make."""


@pytest.fixture(params=["plain", "native"], autouse=True)
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both engines."""
    monkeypatch.setitem(CHOSEN, "kind", request.param)


@cache
def policy(name: str) -> Any:
    model = tiny.build(name)
    attention.choose(model)
    return model


def engine(model: Any, *, batch_size: int = 8, eos: tuple[int, ...] = (world.EOS,), dtype: Any = torch.float32) -> Any:
    how = {"eos_token_ids": eos, "dtype": dtype, "batch_size": batch_size}
    if CHOSEN["kind"] == "plain":
        return PlainEngine(model, pad_token_id=world.PAD, **how)
    attention.choose(model)
    return NativeEngine(model, **how)


def generate(made: Engine, prompts: Any = world.PROMPTS, *, seed: int = 0, tokens: int = 12, t: float = 1.0) -> Any:
    return made.generate(prompts, max_tokens=tokens, temperature=t, generator=world.seeded(seed))


@cache
def small() -> Any:
    """Six tokens, so that every continuation can be enumerated; token 1 is EOS."""
    return tiny.build("llama", vocab_size=VOCABULARY)


def exact(model: Any, prompt: list[int], length: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most `length` tokens, by one plain forward for each prefix."""
    done: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for step in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for prefix, weight in open_.items():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1].double() / temperature
            for token, p in enumerate(logits.softmax(-1).tolist()):
                ends = token == world.EOS or step == length - 1
                (done if ends else grown)[(*prefix, token)] = weight * p
        open_ = grown
    return done


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_completions_have_exactly_the_models_probabilities(temperature: float) -> None:
    """Chi-squared over all completions of at most three tokens, against enumeration; p < 1e-4 is one in 10,000."""
    prompt, draws = [3, 4, 2], 6000
    wanted = exact(small(), prompt, 3, temperature)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-6)
    drawn = generate(engine(small(), batch_size=2000), [prompt] * draws, tokens=3, t=temperature)
    counts = dict.fromkeys(wanted, 0)
    for one in drawn:
        counts[tuple(one.ids)] += 1
    likely = [ids for ids, p in wanted.items() if p * draws >= 5]
    rest = draws * (1 - sum(wanted[ids] for ids in likely))
    observed = [*(counts[ids] for ids in likely), draws - sum(counts[ids] for ids in likely)]
    expected = [*(wanted[ids] * draws for ids in likely), rest]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4
    for one in drawn[:50]:
        assert sum(one.logprobs) == pytest.approx(np.log(wanted[tuple(one.ids)]), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_samplers_logprobs_are_those_of_a_plain_forward(name: str, temperature: float) -> None:
    model = policy(name)
    for prompt, drawn in zip(world.PROMPTS, generate(engine(model, batch_size=3), t=temperature), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + drawn.ids])).logits[0].double() / temperature
        found = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(drawn.ids)[:, None]).squeeze(1)
        assert drawn.logprobs == pytest.approx(found.tolist(), abs=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_the_one_that_its_uniform_number_asks_for(name: str) -> None:
    """Redone without cache, batch or padding: the exact next-token distribution at every step."""
    model, tokens = policy(name), 6
    uniforms = torch.rand(len(world.PROMPTS), tokens, generator=world.seeded(4), dtype=torch.float64)
    drawn = generate(engine(model), seed=4, tokens=tokens)
    for row, (prompt, one) in enumerate(zip(world.PROMPTS, drawn, strict=True)):
        ids = list(prompt)
        for step, token in enumerate(one.ids):
            with torch.no_grad():
                cumulative = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1).cumsum(-1)
            below = 0.0 if token == 0 else float(cumulative[token - 1])
            assert below - 1e-5 <= float(uniforms[row, step]) <= float(cumulative[token]) + 1e-5
            ids.append(token)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours_or_on_the_batch_size(name: str) -> None:
    model = policy(name)
    whole = generate(engine(model, batch_size=8))
    assert len({len(one.ids) for one in whole}) > 1 or name != "llama", "rows that end at different steps are wanted"
    for batch_size in (1, 3, 100):
        other = generate(engine(model, batch_size=batch_size))
        assert [one.ids for one in other] == [one.ids for one in whole]
        for one, two in zip(whole, other, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    changed = [[99, 98]] * 7 + [world.PROMPTS[7]]
    assert generate(engine(model), changed)[7].ids == whole[7].ids


def test_the_order_of_the_prompts_is_kept_whatever_their_lengths() -> None:
    ids = [[7] * n for n in (3, 9, 1, 5)]
    model = small()
    for batch_size in (1, 2, 4):
        drawn = generate(engine(model, batch_size=batch_size), [[2] * len(p) for p in ids], tokens=1)
        for prompt, one in zip(ids, drawn, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[2] * len(prompt)])).logits[0, -1]
            assert one.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[one.ids[0]]), abs=1e-5)


def test_the_same_seed_gives_the_same_completions_and_another_seed_others() -> None:
    made = engine(policy("llama"))
    assert generate(made, seed=1) == generate(made, seed=1)
    assert [one.ids for one in generate(made, seed=1)] != [one.ids for one in generate(made, seed=2)]


def test_equal_prompts_get_different_completions() -> None:
    drawn = generate(engine(policy("llama")), [[5, 6]] * 8)
    assert len({tuple(one.ids) for one in drawn}) > 1


def test_one_state_of_the_generator_gives_one_batch_and_the_next_another() -> None:
    made, generator = engine(policy("llama")), world.seeded()
    first, second = (made.generate(world.PROMPTS, max_tokens=4, temperature=1.0, generator=generator) for _ in range(2))
    assert [one.ids for one in first] != [one.ids for one in second]


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("eos", [(1,), (1, 4), (4, 1, 2), (0,)])
def test_any_listed_eos_ends_a_completion_and_stays_in_it(eos: tuple[int, ...]) -> None:
    drawn: list[Generated] = generate(engine(small(), eos=eos), [[3, 4], [5], [2, 2, 2]] * 20, tokens=6)
    assert {one.finished for one in drawn} == {True, False}
    for one in drawn:
        assert 1 <= len(one.ids) == len(one.logprobs) <= 6
        assert not set(one.ids[:-1]) & set(eos), "nothing follows an EOS"
        assert one.finished == (one.ids[-1] in eos)
        assert one.finished or len(one.ids) == 6, "what did not end by itself reached the limit"
    ends = {one.ids[-1] for one in drawn if one.finished}
    assert ends == set(eos)


def test_an_eos_in_the_prompt_ends_nothing() -> None:
    prompt = [3, world.EOS, 4]
    drawn = generate(engine(small()), [prompt] * 40, tokens=4)
    assert {len(one.ids) for one in drawn} == {1, 2, 3, 4}


def test_at_the_limit_a_completion_is_unfinished_unless_it_ends_just_there() -> None:
    drawn = generate(engine(small()), [[3, 4]] * 60, tokens=1)
    assert all(len(one.ids) == 1 for one in drawn)
    assert {one.finished for one in drawn} == {True, False}
    assert all(one.finished == (one.ids == [world.EOS]) for one in drawn)


def test_a_temperature_near_zero_is_greedy() -> None:
    model = policy("llama")
    for prompt, one in zip(world.PROMPTS, generate(engine(model), t=1e-4, tokens=4), strict=True):
        ids = list(prompt)
        for token in one.ids:
            with torch.no_grad():
                assert token == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_a_pad_token_that_the_policy_writes_is_a_token_like_any_other() -> None:
    drawn = generate(engine(small()), [[3, world.PAD, 4]] * 40, tokens=5)
    inside = [one for one in drawn if world.PAD in one.ids[:-1]]
    assert inside
    for one in inside:
        with torch.no_grad():
            logits = small()(input_ids=torch.tensor([[3, world.PAD, 4, *one.ids]])).logits[0].log_softmax(-1)
        found = [float(logits[2 + t, token]) for t, token in enumerate(one.ids)]
        assert one.logprobs == pytest.approx(found, abs=1e-4)


# ---------------------------------------------------------------- what it leaves alone


def test_a_generation_config_has_no_say() -> None:
    model = copy.deepcopy(small())
    before = generate(engine(model), [[3, 4]] * 30, tokens=3)
    model.generation_config.update(
        top_k=1, top_p=0.1, min_new_tokens=3, repetition_penalty=5.0, do_sample=False, temperature=0.01
    )
    assert generate(engine(model), [[3, 4]] * 30, tokens=3) == before


def test_sampling_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(policy("gpt2"))
    weights, settings = world.snapshot(model), model.config.to_dict()
    options = model.generation_config.to_dict()
    state = torch.get_rng_state()
    generate(engine(model))
    assert world.same(weights, model)
    assert model.config.to_dict() == settings
    assert model.generation_config.to_dict() == options
    assert not model.training
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    assert all(w.grad is None for w in model.parameters())
    assert torch.equal(state, torch.get_rng_state()), "nor is the global stream of random numbers touched"


def test_a_copy_in_bf16_follows_the_policys_weights_when_told() -> None:
    model = copy.deepcopy(policy("llama"))
    model.model.layers[0].requires_grad_(False)
    made = engine(model, dtype=torch.bfloat16)
    first = generate(made)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=world.seeded(9)))
        for weight in model.model.layers[0].parameters():  # frozen weights do not move in training
            weight.copy_(policy("llama").get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0].expand_as(weight))
    assert generate(made) == first
    made.sync()
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    for name, weight in made._sampled.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        if name in trained and weight.numel():  # a packed weight is kept in another order: see below
            assert torch.equal(weight, trained[name].to(torch.bfloat16)), name
    assert [one.ids for one in generate(made)] != [one.ids for one in first]
    assert {w.dtype for w in model.parameters()} == {torch.float32}


def test_a_copy_in_bf16_turns_late_tokens_to_where_the_policy_has_them() -> None:
    """The frequencies of the rotary embedding are buffers, and rounding them would add up over positions."""
    model = copy.deepcopy(policy("llama"))
    made = engine(model, dtype=torch.bfloat16)
    mine = dict(made._sampled.model.named_buffers())
    assert mine
    for name, buffer in model.named_buffers():
        assert torch.equal(mine[name], buffer), name
        assert mine[name].dtype == buffer.dtype == torch.float32


def test_in_fp32_the_engine_samples_from_the_policy_itself() -> None:
    model = copy.deepcopy(policy("llama"))
    made = engine(model)
    before = generate(made)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=world.seeded(9)))
    made.sync()
    assert [one.ids for one in generate(made)] != [one.ids for one in before]


def test_the_engine_keeps_the_protocol() -> None:
    for name in ("generate", "sync"):
        mine = getattr(type(engine(small())), name)
        assert inspect.signature(mine) == inspect.signature(getattr(Engine, name))


def test_who_watches_is_told_of_each_completion_once() -> None:
    told: list[int] = []
    made = engine(policy("llama"), batch_size=3)
    made.generate(world.PROMPTS, max_tokens=6, temperature=1.0, generator=world.seeded(), on_progress=told.append)
    assert sum(told) == len(world.PROMPTS)


# ---------------------------------------------------------------- weights laid out once


@pytest.mark.parametrize("name", NAMES)
def test_packed_weights_give_the_same_products(name: str) -> None:
    """Where a processor has no bf16 products nothing is packed, and both are the same layers."""
    model = copy.deepcopy(policy(name)).to(torch.bfloat16)
    ids = torch.tensor([[2, 3, 4, 5, 6], [9, 8, 7, 6, 5]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        Packed(model, rows=4)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


def test_a_trained_weight_is_packed_anew() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)).to(torch.bfloat16)
    weights = [layer.weight.detach().clone() for layer in layers]
    packed, rows = Packed(layers, rows=2), torch.ones(2, 8, dtype=torch.bfloat16)
    first = layers[0]
    with torch.no_grad():
        before = layers(rows)
        packed.take(first.weight, 3 * weights[0])
        want = torch.nn.functional.linear(rows, 3 * weights[0], first.bias)
        want = torch.nn.functional.linear(want, weights[1], layers[1].bias)
    torch.testing.assert_close(layers(rows), want, rtol=0.02, atol=0.02)
    assert not torch.allclose(layers(rows), before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_what_is_sampled_after_an_update_comes_from_the_new_weights(trainable: str) -> None:
    """In bf16, where the engine has a copy of its own, packed where that pays."""
    model = models.choose_trainable(copy.deepcopy(policy("llama")), trainable)
    made = engine(model, dtype=torch.bfloat16)
    generate(made)
    random = torch.Generator().manual_seed(1)
    for weight in models.trainable_parameters(model).values():
        weight.data += 0.3 * torch.randn(weight.shape, generator=random)
    made.sync()
    told, fresh = generate(made), generate(engine(model, dtype=torch.bfloat16))
    assert [each.ids for each in told] == [each.ids for each in fresh]
    assert [each.logprobs for each in told] == [each.logprobs for each in fresh]


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_an_engine_that_rests_lets_go_of_what_it_packed_until_it_is_synced(trainable: str) -> None:
    """Of what is frozen, too."""
    made = engine(models.choose_trainable(copy.deepcopy(policy("llama")), trainable), dtype=torch.bfloat16)
    before = generate(made)
    made.rest()
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # nothing is packed where it is not
        with pytest.raises(RuntimeError, match="the engine rests: call its `sync`"):
            generate(made)
    made.sync()
    assert generate(made) == before


def test_an_engine_on_the_policy_itself_has_nothing_to_give_up() -> None:
    made = engine(policy("llama"))
    before = generate(made)
    made.rest()
    assert generate(made) == before

"""The native engine: the plain one's completions, with rows that come and go, and prompts that are read once."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch

from rlhf import attention, models
from rlhf.config import Lora
from rlhf.generation import batch, ragged
from rlhf.generation.choice import engine_for, why_not
from rlhf.generation.native import NativeEngine
from rlhf.generation.plain import PlainEngine
from rlhf.generation.ragged import BLOCK, KeyValues, Row
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

NAMES = ("llama", "qwen3", "gpt2", "gemma2", "opt")
EOS = tuple(range(1, 12))
"""So many that rows end at many lengths."""


def prompts(count: int, *, longest: int = 20, seed: int = 0) -> list[list[int]]:
    """Random prompts of random lengths."""
    generator = world.seeded(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(12, 380, (length,), generator=generator).tolist() for length in lengths]


def sampled(engine: Any, rows: list[list[int]], *, tokens: int = 30) -> Any:
    """With the same random numbers each time."""
    return engine.generate(rows, max_tokens=tokens, temperature=1.0, generator=world.seeded(5))


def plain(model: Any, **how: Any) -> PlainEngine:
    return PlainEngine(
        model, **{"eos_token_ids": EOS, "pad_token_id": 0, "dtype": torch.float32, "batch_size": 8} | how
    )


def ours(model: Any, **how: Any) -> NativeEngine:
    attention.choose(model)
    return NativeEngine(model, **{"eos_token_ids": EOS, "dtype": torch.float32, "batch_size": 8} | how)


def forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward pass of the model gets from here on."""
    passes: list[int] = []
    forward = model.forward

    def counted(*args: Any, **named: Any) -> Any:
        passes.append(named["input_ids"].numel())
        return forward(*args, **named)

    monkeypatch.setattr(model, "forward", counted)
    return passes


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("slots", [1, 3, 8, 100])
@pytest.mark.parametrize("name", NAMES)
def test_completions_are_those_of_the_plain_engine(name: str, slots: int) -> None:
    """Ragged prompts, several samples of some, more rows than slots, rows of all lengths."""
    model = tiny.build(name)
    rows = [row for i, row in enumerate(prompts(9)) for _ in range(1 + i % 4)]
    mine, theirs = sampled(ours(model, batch_size=slots), rows), sampled(plain(model), rows)
    assert len({len(one.ids) for one in theirs}) > 5, "rows that end at many lengths are wanted"
    for one, other in zip(mine, theirs, strict=True):
        assert (one.ids, one.finished) == (other.ids, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_sampled_with(name: str) -> None:
    model = models.choose_trainable(tiny.build(name), Lora())
    for weight in models.trainable_parameters(model).values():
        weight.data += 0.3 * torch.randn(weight.shape, generator=world.seeded(1))
    assert why_not(model) is None
    mine, theirs = sampled(ours(model), prompts(12)), sampled(plain(model), prompts(12))
    assert [one.ids for one in mine] == [one.ids for one in theirs]
    with model.disable_adapter():
        assert [one.ids for one in sampled(ours(model), prompts(12))] != [one.ids for one in mine]


def test_rows_longer_than_a_layers_window_forget_what_is_behind_it() -> None:
    """Of prompts that are read as a whole, and while decoding."""
    model = tiny.build("gemma2")
    rows = [[*range(20, 45)], [*range(30, 36)]]
    narrow, wide = sampled(ours(model), rows), sampled(ours(tiny.build("gemma2", sliding_window=64)), rows)
    assert [one.ids for one in narrow] == [one.ids for one in sampled(plain(model), rows)]
    assert [one.ids for one in narrow] != [one.ids for one in wide]


def test_scores_are_capped_where_the_model_caps_them() -> None:
    """With a cap that bends them; of prompts, and while decoding."""
    capped, wide = (tiny.build("gemma2", attn_logit_softcapping=cap) for cap in (0.02, 50.0))
    mine = sampled(ours(capped), prompts(12))
    assert [one.ids for one in mine] == [one.ids for one in sampled(plain(capped), prompts(12))]
    assert [one.ids for one in mine] != [one.ids for one in sampled(plain(wide), prompts(12))]


def test_in_bf16_its_logprobs_are_near_those_in_fp32() -> None:
    model = tiny.build("llama")
    for prompt, one in zip(prompts(12), sampled(ours(model, dtype=torch.bfloat16), prompts(12)), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + one.ids])).logits[0].log_softmax(-1)
        found = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(one.ids)[:, None]).squeeze(1)
        assert one.logprobs == pytest.approx(found.tolist(), abs=0.15)


def test_long_rows_outgrow_the_room_that_was_made() -> None:
    model = tiny.build("llama", max_position_embeddings=512)
    rows = [[40], [41, 42]]
    mine, theirs = (sampled(make(model, eos_token_ids=()), rows, tokens=200) for make in (ours, plain))
    assert [one.ids for one in mine] == [one.ids for one in theirs]


# ---------------------------------------------------------------- what is computed


def test_a_prompt_is_read_once_however_many_samples_continue_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where there are not slots for all of them at once."""
    model = tiny.build("llama")
    engine = ours(model, batch_size=4)
    passes = forwards(model, monkeypatch)
    found = sampled(engine, [[*range(100, 150)]] * 11)
    fed = sum(len(one.ids) - 1 for one in found)  # the last token of a completion is not fed
    assert sum(passes) == 50 + fed


def test_a_slot_that_falls_free_is_filled_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    engine = ours(model, batch_size=4)
    passes = forwards(model, monkeypatch)
    rows = prompts(30, longest=9)
    found = sampled(engine, rows)
    assert sum(passes) == sum(map(len, rows)) + sum(len(one.ids) - 1 for one in found), "no padding, nothing twice"
    assert len(passes) < sum(len(one.ids) for one in found) / 4 + 30, "most steps are of four rows"


def test_prompts_are_read_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    monkeypatch.setattr(batch, "MOST_READ", 40)
    engine = ours(model, batch_size=64)
    theirs = sampled(plain(model), prompts(20))
    passes = forwards(model, monkeypatch)
    assert [one.ids for one in sampled(engine, prompts(20))] == [one.ids for one in theirs]
    assert max(passes) <= 40 + 20


def test_what_a_row_that_has_left_leaves_behind_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that it gives up are filled with nonsense; the next row there must not notice."""
    engine, rows = ours(tiny.build("llama"), batch_size=3), prompts(12, longest=60)
    before = sampled(engine, rows)
    release = KeyValues.release

    def spoiling(cache: KeyValues, gone: Any) -> None:
        release(cache, gone)
        for kept in cache._layers.values():
            for tensor in kept:
                tensor[len(cache.holders) :] = 1e4

    monkeypatch.setattr(KeyValues, "release", spoiling)
    assert sampled(engine, rows) == before


def test_blocks_of_rows_that_leave_are_filled_from_the_end_of_the_pool() -> None:
    """Every row's blocks still hold that row's keys, whoever leaves, and the pool has no gaps."""
    cache, random = KeyValues(), world.seeded(2)
    rows = {number: Row() for number in range(12)}
    for number, row in rows.items():
        cache.lengthen(row, int(torch.randint(1, 5 * BLOCK, (1,), generator=random)))
        for tensor in cache.of_layer(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)):
            tensor[row.blocks] = float(number)
    for leaving in ([11], [0, 5], [3], [1, 2, 10], [4, 6, 7, 8, 9]):
        cache.release([rows.pop(number) for number in leaving])
        assert sorted(block for row in rows.values() for block in row.blocks) == list(range(len(cache.holders)))
        for number, row in rows.items():
            assert len(row.blocks) == -(-row.length // BLOCK)
            assert [cache.holders[block] for block in row.blocks] == [(row, i * BLOCK) for i in range(len(row.blocks))]
            for tensor in cache.of_layer(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)):
                assert (tensor[row.blocks] == number).all()


# ---------------------------------------------------------------- where it may be used


@pytest.mark.parametrize("name", NAMES)
def test_it_is_chosen_where_it_is_proven(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_for(tiny.build(name), eos_token_ids=(1,), pad_token_id=0, dtype=torch.float32, batch_size=4)
    assert isinstance(engine, NativeEngine)
    assert capsys.readouterr().err == ""


def test_another_architecture_falls_back_with_a_line_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_for(tiny.build("bloom"), eos_token_ids=(1,), pad_token_id=0, dtype=torch.float32, batch_size=4)
    assert isinstance(engine, PlainEngine)
    said = capsys.readouterr().err
    assert "BloomForCausalLM is sampled by the plain engine" in said
    assert "attention" in said


def refusal(model: Any, **settings: Any) -> str:
    for name, value in settings.items():
        setattr(model.config, name, value)
    return why_not(model) or "none"


def test_it_refuses_what_it_would_get_wrong() -> None:
    assert "longest row" in refusal(tiny.build("llama"), rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert "another kind" in refusal(tiny.build("llama"), layer_types=["full_attention", "chunked_attention"] * 2)
    assert "how far they see" in refusal(tiny.build("llama"), sliding_window=8)
    assert why_not(tiny.build("llama")) is None


def test_it_refuses_a_model_whose_logits_it_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks at its neighbours, as if all tokens of a line were of one row."""
    model = tiny.build("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda hidden, **named: forward(hidden + hidden.mean(1, keepdim=True), **named)
    )
    assert "differ by" in refusal(model)


@pytest.mark.parametrize("way", ["plain", "_of_blocks"])
def test_both_ways_of_attending_are_proven(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few blocks are put together as rows, many are weighed against each other."""
    sound = getattr(ragged, way)
    assert why_not(tiny.build("llama")) is None

    def wrong(query: Any, key: Any, value: Any, *arguments: Any, **how: Any) -> Any:
        is_read = way == "plain" and query.shape[2] > 1  # a prompt, which goes the same way
        return sound(query, key, value if is_read else 1.01 * value, *arguments, **how)

    monkeypatch.setattr(ragged, way, wrong)
    assert "logits would differ" in refusal(tiny.build("llama"))


def test_it_refuses_a_model_that_cannot_take_such_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    forward = model.forward

    @wraps(forward)
    def strict(*args: Any, **named: Any) -> Any:
        if "ragged" in named:
            raise TypeError("unexpected")
        return forward(*args, **named)

    monkeypatch.setattr(model, "forward", strict)
    assert "TypeError" in refusal(model)

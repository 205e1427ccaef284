"""Batches of ragged sequences: masks from lengths, position ids, and the same numbers however a batch is padded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf import ops
from rlhf.sequences import Sequences, length_mask, pad_rows
from tests.rlhf import tiny

PAD = 0
tokens = st.lists(st.integers(0, 50), min_size=1, max_size=6)  # the pad's id 0 occurs in the text on purpose
batches = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5)


def make(batch: list[tuple[list[int], list[int]]], pad: int = PAD) -> Sequences:
    return Sequences.from_lists([p for p, _ in batch], [c for _, c in batch], pad=pad)


def lists(batch: Sequences) -> list[tuple[list[int], list[int]]]:
    """The batch as lists again, by the lengths alone."""
    found = []
    for b in range(len(batch)):
        prompt = batch.prompt_ids[b].tolist()[batch.prompt_ids.shape[1] - int(batch.prompt_lengths[b]) :]
        found.append((prompt, batch.completion_ids[b].tolist()[: int(batch.completion_lengths[b])]))
    return found


@given(batches, st.sampled_from([0, 7, 51]))
def test_from_lists_pads_prompts_left_and_completions_right(batch, pad: int) -> None:
    made = make(batch, pad)
    assert len(made) == len(batch)
    assert lists(made) == batch
    for b, (prompt, completion) in enumerate(batch):
        assert made.prompt_ids[b].tolist()[: -len(prompt)] == [pad] * (made.prompt_ids.shape[1] - len(prompt))
        assert made.completion_ids[b].tolist()[len(completion) :] == [pad] * (
            made.completion_ids.shape[1] - len(completion)
        )
        assert made.completion_mask[b].tolist() == [t < len(completion) for t in range(made.completion_ids.shape[1])]
    assert made.prompt_lengths.dtype == made.completion_lengths.dtype == made.prompt_ids.dtype == torch.long


def test_rows_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="completion 1 has no tokens"):
        Sequences.from_lists([[1], [2]], [[3], []], pad=0)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        Sequences.from_lists([[]], [[3]], pad=0)


def test_an_empty_batch_has_integer_tensors() -> None:
    empty = Sequences.from_lists([], [], pad=0)
    assert len(empty) == 0
    assert empty.completion_lengths.dtype == torch.long
    assert pad_rows([], pad=0, side="left").shape == (0, 0)


def test_length_mask() -> None:
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
    ]


@given(batches)
def test_model_inputs_hold_all_tokens_but_the_last_at_their_own_positions(batch) -> None:
    made = make(batch)
    width = made.completion_ids.shape[1]
    inputs = made.model_inputs()
    for b, (prompt, completion) in enumerate(batch):
        attended = inputs["attention_mask"][b].bool()
        fed = (prompt + completion)[: inputs["input_ids"].shape[1] - (made.prompt_ids.shape[1] - len(prompt))]
        assert inputs["input_ids"][b][attended].tolist() == fed
        assert inputs["position_ids"][b][attended].tolist() == list(range(len(fed)))
        assert (inputs["position_ids"][b] >= 0).all()
        # the T last inputs predict the completion: the first of them is the prompt's last token
        predictors = inputs["input_ids"][b, -width:].tolist()
        assert predictors[: len(completion)] == [prompt[-1], *completion[:-1]]
    assert {value.shape for value in inputs.values()} == {(len(batch), made.prompt_ids.shape[1] + width - 1)}


@dataclass(frozen=True)
class Measured(Sequences):
    """As a rollout: numbers per token and per sequence, and things that are no tensors."""

    values: Tensor
    hidden: Tensor
    scores: Tensor
    note: str = "kept"


@given(batches, st.data())
def test_select_is_the_batch_of_the_selected_lists(batch, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(batch) - 1), min_size=1, max_size=6))
    made = make(batch)
    per_token = torch.arange(made.completion_ids.numel(), dtype=torch.float64).reshape(made.completion_ids.shape)
    measured = Measured(
        **vars(made) | {"trunk_states": made.model_inputs()["input_ids"][..., None]},
        values=per_token,
        hidden=per_token[..., None].expand(-1, -1, 3),
        scores=torch.arange(len(batch), dtype=torch.float64),
    )
    chosen = measured.select(torch.tensor(rows))
    expected = make([batch[r] for r in rows])
    for name in set(vars(expected)) - {"trunk_states"}:
        assert torch.equal(getattr(chosen, name), getattr(expected, name)), name
    assert chosen.trunk_states is not None
    assert torch.equal(chosen.trunk_states.squeeze(-1), expected.model_inputs()["input_ids"])
    width = expected.completion_ids.shape[1]
    assert torch.equal(chosen.values, per_token[rows, :width])
    assert torch.equal(chosen.hidden, per_token[rows, :width, None].expand(-1, -1, 3))
    assert chosen.scores.tolist() == rows
    assert chosen.note == "kept"


def test_select_understands_a_boolean_mask_of_rows_and_to_moves_everything() -> None:
    made = make([([1, 2, 3], [4]), ([5], [6, 7])])
    assert lists(made.select(torch.tensor([False, True]))) == [([5], [6, 7])]
    moved = made.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if value is not None} == {"meta"}


# ---------------------------------------------------------------- what a model makes of it


@cache
def model(name: str) -> Any:
    """In fp64, but for Gemma 2: transformers' eager attention makes NaN of left padding in fp64."""
    built = tiny.build(name)
    return built if name == "gemma2" else built.double()


def close(name: str) -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-5 if name == "gemma2" else 1e-9}


@torch.no_grad()
def logprobs(name: str, batch: Sequences) -> Tensor:
    """Of the completions' tokens, 0 outside."""
    width = batch.completion_ids.shape[1]
    logits = model(name)(**batch.model_inputs()).logits[:, -width:]
    return ops.masked(ops.token_logprobs(logits, batch.completion_ids), batch.completion_mask)


@torch.no_grad()
def alone(name: str, prompt: list[int], completion: list[int]) -> Tensor:
    """The same for one sequence without padding, mask or position ids: the model's own defaults."""
    ids = torch.tensor([prompt + completion])
    found = model(name)(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([found[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
@given(batch=batches)
@settings(max_examples=15)
def test_logprobs_in_a_ragged_batch_are_those_of_each_sequence_alone(name: str, batch) -> None:
    together = logprobs(name, make(batch))
    for b, (prompt, completion) in enumerate(batch):
        expected = alone(name, prompt, completion)
        torch.testing.assert_close(together[b, : len(completion)], expected, **close(name))
        assert (together[b, len(completion) :] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (7, 0), (0, 5), (3, 2)])
def test_more_padding_changes_nothing(name: str, left: int, right: int) -> None:
    prompt, completion = [5, 0, 9], [3, 0, 1]
    padded = Sequences(
        prompt_ids=torch.tensor([[17] * left + prompt]),
        prompt_lengths=torch.tensor([3]),
        completion_ids=torch.tensor([completion + [23] * right]),
        completion_lengths=torch.tensor([3]),
    )
    found = logprobs(name, padded)
    torch.testing.assert_close(found[0, :3], alone(name, prompt, completion), **close(name))

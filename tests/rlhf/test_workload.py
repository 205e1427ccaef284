"""What there is to do in a step, by hand and by what a rollout really forwards."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation import Generated
from rlhf.micro_batches import partition
from rlhf.sequences import Sequences
from rlhf.workload import Lengths, Row, decoded, decoding, micro_batches
from tests.rlhf import ppo_world as world


def sampled(*lengths: int, limit: int) -> list[Generated]:
    return [Generated([7] * length, [0.0] * length, length < limit) for length in lengths]


def test_lengths_that_are_known_to_the_end_are_taken_as_they_are() -> None:
    lengths = Lengths.of(sampled(1, 2, 2, 4, 4, limit=4), limit=4)
    assert lengths.longer.tolist() == pytest.approx([1, 4 / 5, 2 / 5, 2 / 5])
    assert lengths.mean == pytest.approx((1 + 2 + 2 + 4 + 4) / 5)


def test_beyond_what_was_sampled_completions_end_as_often_as_they_did() -> None:
    lengths = Lengths.of(sampled(2, 2, 1, 2, limit=2), limit=4)  # one of seven tokens was an end
    assert lengths.longer.tolist() == pytest.approx([1, 3 / 4, 3 / 4, 3 / 4 * 6 / 7])


def test_completions_that_were_cut_early_say_nothing_of_what_comes_after() -> None:
    lengths = Lengths.of([*sampled(1, 1, 1, limit=1), *sampled(2, 3, limit=3)], limit=3)
    assert lengths.longer.tolist() == pytest.approx([1, 1, 1 / 2])


def test_what_is_drawn_has_these_lengths() -> None:
    lengths = Lengths.of(sampled(1, 2, 2, 4, 4, limit=4), limit=4)
    drawn = lengths.draw(20_000, torch.Generator().manual_seed(0))
    assert set(drawn) == {1, 2, 4}
    assert sum(drawn) / len(drawn) == pytest.approx(lengths.mean, rel=0.02)


def test_decoding_by_hand() -> None:
    rows = [Row(3, 2), Row(5, 4), Row(2, 1)]
    in_batches = {"together": 2, "refills": False}  # prompts of 5 and 3, filled up to 5; then the one of 2
    work = decoding(rows, **in_batches)
    assert work == {"prompt_tokens": 10 + 2, "decode_steps": 4 + 1, "sampled_tokens": 7, "read_tokens": 6 + 21}
    fed = decoded(rows, **in_batches)
    assert (fed.tokens, fed.pairs, fed.completion) == (12 + 4, 2 * 25 + 4 + 6 + 21, 7)
    refilled = {"together": 2, "refills": True}  # the one of 2 takes the place of that of 3, and ends before that of 5
    work = decoding(rows, **refilled)
    assert work == {"prompt_tokens": 10, "decode_steps": 4, "sampled_tokens": 7, "read_tokens": 21 + 4}
    fed = decoded(rows, **refilled)
    assert (fed.tokens, fed.pairs, fed.completion) == (10 + 4, 25 + 9 + 4 + 21 + 4, 7)


def test_a_prompt_of_several_samples_is_read_once() -> None:
    rows = [Row(5, 2), Row(5, 3, is_read=False)]
    assert decoding(rows, together=2, refills=True)["prompt_tokens"] == 5
    fed = decoded(rows, together=2, refills=True)
    assert (fed.tokens, fed.completion) == (5 + 5 - 2, 5)


def test_micro_batches_are_those_of_a_rollout() -> None:
    whole = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    rows = [Row(len(p), len(c)) for p, c in zip(world.PROMPTS, world.COMPLETIONS, strict=True)]
    shapes = [whole.select(part).model_inputs()["input_ids"].shape for part in partition(whole, 3)]
    found = micro_batches(rows, 3)
    assert micro_batches(rows, 1, tokens=10**6) == [micro_batches(rows, len(rows))[0]]
    assert [part.tokens for part in found] == [b * width for b, width in shapes]
    assert [part.pairs for part in found] == [b * width**2 for b, width in shapes]
    assert sum(part.completion for part in found) == sum(map(len, world.COMPLETIONS))

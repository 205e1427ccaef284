"""The shared vocabulary: rankings with ties and gaps, comparisons read from both sides, and no heavy imports."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.types import (
    Comparison,
    ConfigError,
    ContractError,
    DataError,
    Ranking,
    RewardFn,
    TrunkReward,
    UserError,
    prompt_text,
)


def ranking(*ranks: Any, **more: Any) -> Ranking:
    return Ranking("p", tuple("abcdefghi"[: len(ranks)]), ranks, "a7", **more)


@st.composite
def any_ranks(draw: st.DrawFn) -> tuple[int | None, ...]:
    count = draw(st.integers(2, 9))
    return tuple(draw(st.lists(st.none() | st.integers(1, count), min_size=count, max_size=count)))


@given(any_ranks())
def test_levels_and_comparisons_say_what_the_ranks_say(ranks: tuple[int | None, ...]) -> None:
    made = ranking(*ranks)
    assert sorted(i for level in made.levels for i in level) == [i for i, rank in enumerate(ranks) if rank is not None]
    assert all(level for level in made.levels)
    order = {i: position for position, level in enumerate(made.levels) for i in level}
    for i, j in ((i, j) for i in order for j in order):
        assert (order[i] < order[j]) == (ranks[i] < ranks[j])  # type: ignore[operator]
    comparisons = list(made.comparisons())
    assert len(comparisons) == len(order) * (len(order) - 1) // 2
    for c in comparisons:
        first, second = (ranks[made.completions.index(text)] for text in (c.first, c.second))
        assert first is not None
        assert second is not None
        assert c.outcome == (0.5 if first == second else 1.0 if first < second else 0.0)


def test_ties_gaps_and_unranked() -> None:
    made = ranking(1, 2, 2, None)
    assert made.levels == [[0], [1, 2]]
    assert [(c.first, c.second, c.outcome) for c in made.comparisons()] == [
        ("a", "b", 1.0),
        ("a", "c", 1.0),
        ("b", "c", 0.5),
    ]
    assert ranking(3, 1, 3).levels == [[1], [0, 2]]
    assert ranking(None, None).levels == []


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_swap_is_the_same_judgement(outcome: float) -> None:
    comparison = Comparison("p", "a", "b", outcome)
    assert comparison.swap() == Comparison("p", "b", "a", 1 - outcome)
    assert comparison.swap().swap() == comparison


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ranking(1), "at least 2 completions, this one has 1"),
        (lambda: Ranking("p", ("a", "b"), (1, 2, 3), "a"), "3 ranks for 2 completions"),
        (lambda: ranking(0, 1), "rank 0 is not an integer from 1 to 2"),
        (lambda: ranking(1, 3), "rank 3 is not"),
        (lambda: ranking(1, True), "rank True is not"),
        (lambda: ranking(1, 2.0), "rank 2.0 is not"),
        (lambda: ranking(1, "2"), "rank '2' is not"),
        (lambda: ranking(1, 2, presented_order=(0, 0)), r"presented_order \[0, 0\] is not"),
        (lambda: ranking(1, 2, presented_order=(0,)), "presented_order"),
        (lambda: ranking(1, 2, presented_order=(1, 2)), "presented_order"),
        (lambda: ranking(1, 2, presented_order=("0", 1)), "presented_order"),
        (lambda: ranking(1, 2, presented_order=(False, True)), "presented_order"),
    ],
)
def test_parts_that_do_not_fit_are_refused(build: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build()


def test_errors_are_for_the_user_and_values() -> None:
    for kind in (DataError, ConfigError, ContractError):
        assert issubclass(kind, UserError)
        assert issubclass(kind, ValueError)


def test_prompts_as_people_read_them() -> None:
    assert prompt_text("Hi") == "Hi"
    assert prompt_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]) == (
        "user: Hi\n\nassistant: Yes?"
    )


def test_any_callable_is_a_reward() -> None:
    assert isinstance(lambda prompts, completions: [0.0], RewardFn)
    assert not isinstance(0.5, RewardFn)
    assert not isinstance(lambda prompts, completions: [0.0], TrunkReward)


def test_the_vocabulary_needs_no_torch(without_torch: Any) -> None:
    found = without_torch("import rlhf.types, rlhf.contract, rlhf.config")
    assert found.returncode == 0, found.stderr

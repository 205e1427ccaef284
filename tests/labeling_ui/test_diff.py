"""The word diff against texts whose differences are known, and against what every diff must satisfy."""

from __future__ import annotations

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from labeling_ui import diff


def test_the_words_that_differ_are_named() -> None:
    assert diff.words("The cat sat on the mat", "The dog sat on a mat") == [
        ("same", "The "),
        ("gone", "cat "),
        ("new", "dog "),
        ("same", "sat on "),
        ("gone", "the "),
        ("new", "a "),
        ("same", "mat"),
    ]


def test_a_lone_word_in_common_between_long_changes_is_no_agreement() -> None:
    assert diff.words("We met at the old pier", "Nobody likes rain on the road to Leeds") == [
        ("gone", "We met at the old pier"),
        ("new", "Nobody likes rain on the road to Leeds"),
    ]


def test_languages_without_spaces_are_compared_by_character() -> None:
    assert diff.words("猫が好き", "犬が好き") == [("gone", "猫"), ("new", "犬"), ("same", "が好き")]


@given(st.text(alphabet="ab <&\n猫é", max_size=60), st.text(alphabet="ab <&\n猫é", max_size=60))
def test_both_texts_can_be_read_from_the_pieces(first: str, second: str) -> None:
    pieces = diff.words(first, second)
    assert "".join(text for kind, text in pieces if kind != "new") == first
    assert "".join(text for kind, text in pieces if kind != "gone") == second
    assert all(text for _, text in pieces)


def test_equal_texts_are_one_piece() -> None:
    assert diff.words("one\n two", "one\n two") == [("same", "one\n two")]
    assert diff.words("", "") == []


def test_only_the_beginning_of_long_texts_is_compared_and_in_bounded_time() -> None:
    rng = random.Random(0)
    few = [" ".join(rng.choice("abcdefghij") for _ in range(50_000)) for _ in range(2)]
    many = [" ".join(str(rng.randrange(120)) for _ in range(50_000)) for _ in range(2)]
    started = time.process_time()
    for first, second in (few, many, ["x" * 100_000, "y"]):
        pieces = diff.words(first, second)
        assert "".join(text for kind, text in pieces if kind != "new") == first[: diff.MAX_CHARACTERS]
    assert time.process_time() - started < 10

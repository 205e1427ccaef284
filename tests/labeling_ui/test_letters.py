"""A ranking as one types it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling_ui.letters import LETTERS, parsed, written
from labeling_ui.said import Said
from rlhf.types import DataError


@pytest.mark.parametrize(
    ("text", "tiers", "aside"),
    [
        ("B > A = D / C", [[1], [0, 3]], (2,)),
        ("b>a=d/c", [[1], [0, 3]], (2,)),
        ("A, B, C, D", [[0], [1], [2], [3]], ()),
        ("a=b=c=d", [[0, 1, 2, 3]], ()),
        (" D>C / a b ", [[3], [2]], (0, 1)),
        ("/ a=b, c d", [], (0, 1, 2, 3)),
    ],
)
def test_what_is_understood(text: str, tiers: list[list[int]], aside: tuple[int, ...]) -> None:
    assert parsed(text, 4) == (tiers, aside)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "A, B, C, D is missing"),
        ("A > B > C", "D is missing: rank it, or set it aside after a slash"),
        ("A > B > C > E", "'E' is none of the cards A to D"),
        ("A > B > C > D > A", "A stands there twice"),
        ("A > B > C / D A", "A stands there twice"),
        ("A >> B > C > D", "one letter between two signs"),
        ("AB > C > D", "one letter between two signs"),
        ("> A > B > C > D", "one letter between two signs"),
        ("A > B / C / D", "one letter between two signs"),
        ("A > B > C > <", "'<' is none of the cards"),
        ("A > B > C > Д", "'Д' is none of the cards"),
    ],
)
def test_what_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(DataError) as refusal:
        parsed(text, 4)
    assert said in str(refusal.value)


@given(st.integers(2, 26).flatmap(lambda count: st.permutations(range(count))), st.data())
def test_there_and_back(order: list[int], data: st.DataObject) -> None:
    tiers: list[tuple[int, ...]] = []
    aside = data.draw(st.integers(0, len(order) - 2))
    for place in order[aside:]:
        if tiers and data.draw(st.booleans()):
            tiers[-1] = (*tiers[-1], place)
        else:
            tiers.append((place,))
    said = Said(tuple(tiers), tuple(order[:aside]), {}, None)
    assert parsed(written(said), len(LETTERS[: len(order)])) == ([list(tier) for tier in tiers], said.aside)

"""Markdown of model text: nothing in it may act, whatever a parser makes of it; formulas and prices are told apart."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling_ui.markdown import AND, BANG, LESS, MARK, MAX_FORMATTED, as_markdown

INLINE, DISPLAY = "\ufdd4{}\ufdd5", "\ufdd6{}\ufdd7"


def body(text: str) -> str:
    marked = as_markdown(text, "key")
    assert marked.startswith(f"{MARK}key{MARK}\n\n")
    return marked.partition("\n\n")[2]


@given(st.text(alphabet="<&![]()`~$\\ \nabc%'\"{}", max_size=80))
def test_no_text_keeps_what_could_start_html_or_an_image(text: str) -> None:
    """Within formulas alone, entities stand for `<` and `&`."""
    marked = as_markdown(text, "key")
    outside = re.sub("\ufdd4.*?\ufdd5|\ufdd6.*?\ufdd7", "", marked, flags=re.DOTALL)
    assert "<" not in marked
    assert "![" not in marked
    assert "&" not in outside


@given(st.text(alphabet="<&![]()` \nabc", min_size=1, max_size=80).filter(str.strip))
def test_the_characters_can_be_put_back(text: str) -> None:
    restored = body(text)
    for sign, character in ((LESS, "<"), (AND, "&"), (BANG, "!")):
        restored = restored.replace(sign, character)
    assert restored == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$x$ and $$y$$", INLINE.format("x") + " and " + DISPLAY.format("y")),
        (r"\(a\) \[b\]", INLINE.format("a") + " " + DISPLAY.format("b")),
        ("$a<b & c$", INLINE.format("a&lt;b &amp; c")),
        ("from $5 to $6", "from $5 to $6"),
        ("$ x $ and $HOME and US$5 and \\$x$", "$ x $ and $HOME and US$5 and \\$x$"),
        ("`$x$` and\n```\n$$y$$\n```", "`$x$` and\n```\n$$y$$\n```"),
        ("$$never closed", "$$never closed"),
        ("$$two\n\nparagraphs$$", "$$two\n\nparagraphs$$"),
    ],
)
def test_formulas_are_told_from_dollars(text: str, expected: str) -> None:
    assert body(text) == expected


def test_gradios_own_signs_are_taken_out() -> None:
    assert "mermaid" not in body("```mermaid\ngraph\n```\n> ~~~ Mermaid\n")
    assert "%%%LATEX" not in body("%%%LATEX_BLOCK_0%%%")
    assert body(f"{LESS}{MARK}\ufdd6") == "\ufffd" * 3


@pytest.mark.parametrize("text", ["", " \n", "x" * (MAX_FORMATTED + 1), ">" * 50 + "x", "- " * 50 + "x", "1. " * 50])
def test_what_a_parser_may_choke_on_is_shown_as_written_only(text: str) -> None:
    assert as_markdown(text, "key") == ""


@pytest.mark.parametrize("piece", ["$", "\\[", "\\(", "`", "```\n", "$$", "![", "~~~", "$a", "`` "])
def test_hostile_repetition_takes_no_time(piece: str) -> None:
    started = time.process_time()
    as_markdown(piece * (MAX_FORMATTED // len(piece)), "key")
    assert time.process_time() - started < 1

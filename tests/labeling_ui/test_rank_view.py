"""What reaches the browser: texts as inert Markdown, and a widget that knows no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labeling_ui import rank_view
from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService
from rlhf.store import Store
from rlhf.types import Completion

HOSTILE = ["<img src=x onerror=alert(1)>", "${alert(1)} {{constructor}}", "</script><script>alert(1)</script>"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b> & c", "a &lt;b> &amp; c"),
        ("`x < y` < z", "`x < y` &lt; z"),
        ("```\na < b\n``` <i>", "```\na < b\n``` &lt;i>"),
        ("``` <never closed", "``` <never closed"),
        ("x\n~~~\n<a>\n~~~\n<b>", "x\n~~~\n<a>\n~~~\n&lt;b>"),
        ("no ``` fence <b>", "no ``` fence &lt;b>"),
        ("![x](http://evil.example/t.png)", "!&#91;x](http://evil.example/t.png)"),
        ("**bold** $5", "**bold** $5"),
    ],
)
def test_html_and_images_are_shown_as_written(text: str, shown: str) -> None:
    assert rank_view.as_markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "fence"), [("a <b> *c*\n  d", "~~~"), ("```x```", "~~~"), ("~~~~\nout\n~~~~", "~~~~~"), ("a ~ b", "~~~")]
)
def test_texts_as_written_cannot_leave_their_block(text: str, fence: str) -> None:
    assert rank_view.as_written(text) == f"{fence}text\n{text}\n{fence}"


def test_conversations_name_who_speaks() -> None:
    turns = [{"role": "system", "content": "Be <kind>."}, {"role": "user", "content": "Hi"}]
    assert rank_view.prompt_markdown(turns, rank_view.as_markdown) == "**system**\n\nBe &lt;kind>.\n\n**user**\n\nHi"  # pyright: ignore


def test_the_widget_never_sees_model_text(tmp_path: Path) -> None:
    service = LabelService(Store(tmp_path / "labels.db"), Policy())
    service.store.add_completions(HOSTILE[1], [Completion(text, "secret-model", 0) for text in HOSTILE])
    prompt, widget, *cards = rank_view._shown(service, "me", slots=4)
    state = json.dumps(widget)
    assert not [text for text in [*HOSTILE, "alert", "secret-model"] if text in state]
    assert widget["count"] == 3
    assert prompt == "${alert(1)} {{constructor}}"
    assert sorted(cards) == sorted(["", *map(rank_view.as_markdown, HOSTILE)])


def test_templates_are_static() -> None:
    page = rank_view.build(LabelService.__new__(LabelService), "me", slots=3)
    templates = [block.html_template for block in page.blocks.values() if hasattr(block, "html_template")]
    assert len(templates) == 5
    assert not [mark for template in templates for mark in ("${", "{{") if mark in template]


def test_an_empty_text_and_the_end_are_told(tmp_path: Path) -> None:
    service = LabelService(Store(tmp_path / "labels.db"), Policy())
    service.store.add_completions("p", [Completion("", "m", 0), Completion(" ", "m", 1)])
    assert rank_view._shown(service, "me", slots=2)[2:] == ["*(empty)*", "*(empty)*"]
    task = service.next_task("me")
    assert task is not None
    service.submit("me", task.id, task.key, [[0, 1]])
    prompt, widget, *cards = rank_view._shown(service, "me", slots=2)
    assert "Everything is ranked" in prompt
    assert (widget["id"], widget["ranked"], widget["remaining"], cards) == (None, 1, 0, ["", ""])

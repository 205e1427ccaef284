"""What the page's scripts get to know of a task, and templates that hold none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labeling_ui import rank_view
from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService
from rlhf.store import Store
from rlhf.types import Completion, Prompt, StoreError

HOSTILE = ["<img src=x onerror=alert(1)>", "${alert(1)} {{constructor}}", "</script><script>alert(1)</script>"]


def service_of(folder: Path, prompt: Prompt, *texts: str) -> LabelService:
    service = LabelService(Store(folder / "labels.db"), Policy())
    service.store.add_completions(prompt, [Completion(text, "secret-model", i) for i, text in enumerate(texts)])
    return service


def test_the_task_comes_without_its_origin(tmp_path: Path) -> None:
    onboarding, state = rank_view._state(service_of(tmp_path, "p", *HOSTILE), "me", ["helpful"], 1)
    assert onboarding.passed
    assert "secret-model" not in json.dumps(state)
    assert "kind" not in json.dumps(state)
    assert sorted(state["texts"]) == sorted(HOSTILE)
    assert (state["screen"], state["count"], state["criteria"]) == ("rank", 3, ["helpful"])


def test_templates_are_static(tmp_path: Path) -> None:
    page = rank_view.build(service_of(tmp_path, HOSTILE[1], *HOSTILE), slots=3)
    templates = [block.html_template for block in page.blocks.values() if hasattr(block, "html_template")]
    assert templates
    assert not [mark for template in templates for mark in ("${", "{{", "alert") if mark in template]


def test_the_end_is_told(tmp_path: Path) -> None:
    service = service_of(tmp_path, "p", "a", "b")
    task = service.next_task("me")
    assert task is not None
    service.submit("me", task.id, task.key, [[0, 1]])
    _, state = rank_view._state(service, "me", [], 1)
    assert state["screen"] == "finished"
    assert "Everything is ranked" in state["message"]
    assert (state["id"], state["texts"], state["progress"]["ranked"], state["progress"]["remaining"]) == (
        None,
        [],
        1,
        0,
    )


@pytest.mark.parametrize(("room", "shown"), [(4, 3), (3, 3), (2, 2), (1, 1)])
def test_a_long_conversation_keeps_its_last_turns_apart(tmp_path: Path, room: int, shown: int) -> None:
    turns: Prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": "Well?"},
    ]
    _, state = rank_view._state(service_of(tmp_path, turns, "a", "b"), "me", [], room)
    assert len(state["turns"]) == shown
    whole = "\n".join(turn["text"] for turn in state["turns"])
    assert all(turn["content"] in whole for turn in turns)
    if shown > 1:
        assert state["turns"][-1] == {"role": "user", "text": "Well?"}


def test_trouble_with_the_store_is_not_the_end_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be shown for good, though the next question may be answered."""
    service = service_of(tmp_path, "p", "a", "b")

    def busy(_annotator: str) -> None:
        raise StoreError("the label store is locked")

    monkeypatch.setattr(service, "next_task", busy)
    with pytest.raises(StoreError):
        rank_view._state(service, "me", [], 1)

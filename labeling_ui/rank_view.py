"""The page on which annotators rank the completions of one prompt.

Model text is hostile. It reaches the browser twice: as Markdown that was made inert (`markdown.py`), and as data that
`static/*.js` puts into text nodes. Who ranks comes from the gate's scope at every event, never from the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from labeling_ui.guidelines import Onboarding
from labeling_ui.markdown import as_markdown, text_box
from labeling_ui.person import person_of
from labeling_ui.said import FLAGS
from labeling_ui.service import LabelService, Task
from rlhf.contract import digest
from rlhf.types import DataError, Prompt, StoreError

STATIC = Path(__file__).parent / "static"
"""To be served under `/page`: the page's scripts are in its folder `rank`."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_TURNS = 40

WELCOME = """Rank the completions from best to worst. Put those that are equally good on the same rank.
Set aside what you cannot judge. Read all of them before you begin: their order on the page means nothing."""

FINISHED = "Everything is ranked. Thank you! There is nothing left for you in this round; you can close the page."


TOO_MANY = """This item has {count} completions, and this page was started when there were at most {slots}.
Whoever runs this round has to start `rlhf label` again; what you have ranked is saved."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; a plain prompt is a turn of nobody."""

    role: str
    text: str


def build(service: LabelService, *, slots: int, criteria: Sequence[str] = (), guidelines: str = WELCOME) -> gr.Blocks:
    """The page, with room for `slots` completions, each of which may be rated by `criteria`.

    `guidelines` (Markdown) are shown where the round has none of its own.
    """
    turns = _most_turns(service)
    with gr.Blocks(title="Rank completions", analytics_enabled=False, fill_width=True) as page:
        _place("top")
        with gr.Column(elem_id="guidelines"):
            _place("guidelines-head")
            guide = gr.Markdown(elem_id="guidelines-text")
        _place("message")
        _place("quiz-place")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, elem_id="reading"):
                _place("steps")
                with gr.Column(elem_id="prompt"):
                    prompt = [_text_block("turn") for _ in range(turns)]
                _place("tools")
                with gr.Column(elem_id="cards"):
                    cards = [_text_block("card") for _ in range(slots)]
            with gr.Column(scale=2, min_width=300, elem_id="side-column"):
                _place("side")
        wire = gr.HTML(html_template="<i></i>", js_on_load=_START, apply_default_css=False, elem_id="wire")

        def show(request: gr.Request) -> list[Any]:
            onboarding, state = _state(service, _annotator(request), criteria, turns)
            if state["count"] > slots:
                state |= _EMPTY | {"screen": "stopped", "message": TOO_MANY.format(count=state["count"], slots=slots)}
            texts = [*_padded([turn["text"] for turn in state["turns"]], turns), *_padded(state["texts"], slots)]
            return [state, onboarding.guidelines or guidelines, *(as_markdown(text, state["key"]) for text in texts)]

        # Not queued: what waits in Gradio's queue dies with the tab.
        how: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        for event in (page.load, wire.next):
            event(show, outputs=[wire, guide, *prompt, *cards], **how)
    return page.queue(api_open=False)


def _annotator(request: gr.Request) -> str:
    """Whom the gate let in. Raises PermissionError."""
    return person_of(request.request.scope if request.request else {}).name


def _place(name: str) -> None:
    """An empty element that the page's scripts fill. It never gets a value, so that Gradio never draws it again."""
    gr.HTML(html_template=f'<div class="{name}"></div>', js_on_load=None, apply_default_css=False, elem_id=name)


def _text_block(kind: str) -> gr.Markdown:
    """A text as Markdown and as written, between a head and a tail for the scripts."""
    how: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}
    with gr.Column(elem_classes=["text-block", kind]):
        gr.HTML(html_template=f'<div class="{kind}-head"></div>', **how)
        text = text_box(elem_classes="model-text")
        gr.HTML(html_template=f'<pre class="written"></pre><div class="{kind}-tail"></div>', **how)
    return text


def _state(
    service: LabelService, annotator: str, criteria: Sequence[str], turns: int
) -> tuple[Onboarding, dict[str, Any]]:
    """What comes before the first item, and what the scripts get to know."""
    onboarding = service.onboarding(annotator)
    screen, message, task = _task(service, annotator) if onboarding.passed else ("quiz", "", None)
    state = {
        "person": annotator,
        "screen": screen,
        "message": message,
        "criteria": list(criteria),
        "wordings": FLAGS,
        "progress": asdict(service.progress(annotator)),
        "last": service.last(annotator),
        "guidelines": {"version": onboarding.version, "given": onboarding.guidelines is not None},
        "questions": [asdict(question) for question in onboarding.questions],
    }
    return onboarding, state | (_EMPTY if task is None else _task_state(task, turns))


def _task(service: LabelService, annotator: str) -> tuple[str, str, Task | None]:
    """Which screen the annotator sees, with which message and task."""
    try:
        task = service.next_task(annotator)
    except StoreError:
        raise  # it passes: the page asks again
    except DataError as error:  # such as: an admin has paused this annotator
        return "stopped", str(error), None
    return ("finished", FINISHED, None) if task is None else ("rank", "", task)


_EMPTY: dict[str, Any] = {"id": None, "key": "", "draft": "", "count": 0, "texts": [], "turns": []}


def _task_state(task: Task, turns: int) -> dict[str, Any]:
    """The task without its origin; `draft` names the browser's draft of exactly these texts."""
    return {
        "id": task.id,
        "key": task.key,
        "draft": digest(repr((task.id, task.prompt, task.completions))),
        "count": len(task.completions),
        "texts": list(task.completions),
        "turns": [asdict(turn) for turn in _fitting(_conversation(task.prompt), turns)],
        "before": None if task.before is None else asdict(task.before),
        "said_at": None if task.said_at is None else 1000 * task.said_at,
        "saved": task.draft,
    }


def _conversation(prompt: Prompt) -> list[Turn]:
    if isinstance(prompt, str):
        return [Turn("", prompt)]
    return [Turn(turn["role"], turn["content"]) for turn in prompt]


def _fitting(turns: list[Turn], room: int) -> list[Turn]:
    """At most `room` turns; of longer conversations, those before the last ones are shown as one."""
    if len(turns) <= room:
        return turns
    early = turns[: len(turns) - room + 1]
    return [Turn("", "\n\n".join(f"[{turn.role}]\n{turn.text}" for turn in early)), *turns[len(early) :]]


def _most_turns(service: LabelService) -> int:
    items = service.store.items(service.policy.round)
    return min(MOST_TURNS, max((len(_conversation(item.prompt)) for item in items), default=1))


def _padded(texts: Sequence[str], room: int) -> list[str]:
    return [*texts, *[""] * (room - len(texts))]


_START = """
const path = new URL(window.gradio_config?.root ?? "/", document.baseURI).pathname.replace(/[/]$/, "");
const tools = { props, watch, next: () => trigger("next") };
import(`${path}/page/rank/main.js`).then((page) => page.start(tools)).catch((error) => {
  console.error(error);
  document.body.prepend("The page could not be loaded: reload it.");
});
"""

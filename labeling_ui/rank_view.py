"""The page on which one person ranks the completions of one prompt.

Model text is hostile: it goes into sanitised Markdown only, with its HTML shown as text. The ranking widget gets
letters and numbers; `static/rank.js` draws it and sends what was said to the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from labeling_ui.service import FLAGS, LabelService, Task
from rlhf.contract import digest
from rlhf.types import Prompt

STATIC = Path(__file__).parent / "static"

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

WELCOME = """Rank the completions from best to worst. Put those that are equally good on the same rank.
Set aside what you cannot judge. Read all of them before you begin: their order on the page means nothing."""

FINISHED = """### Everything is ranked

Thank you. There is nothing left for you in this round; you can close the page."""


def build(service: LabelService, annotator: str, *, slots: int, guidelines: str = WELCOME) -> gr.Blocks:
    """The page for one annotator, with room for `slots` completions."""
    with gr.Blocks(title="Rank completions", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(html_template=_HEADER, js_on_load=None, apply_default_css=False, elem_id="progress")
        with gr.Accordion("Guidelines", open=False, elem_id="guidelines"):
            gr.Markdown(guidelines)
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, elem_id="reading"):
                prompt = gr.Markdown(elem_id="prompt", line_breaks=True)
                written = gr.Checkbox(
                    label="Show texts as written, without formatting", container=False, elem_id="written"
                )
                with gr.Column(elem_id="cards"):
                    cards = [_card(slot) for slot in range(slots)]
            with gr.Column(scale=2, min_width=300, elem_id="side"):
                script = (STATIC / "rank.js").read_text(encoding="utf-8")
                widget = gr.HTML(
                    html_template='<div class="rank"></div>', js_on_load=script, apply_default_css=False, elem_id="rank"
                )
        show = partial(_shown, service, annotator, slots)
        # Not queued: what waits in Gradio's queue dies with the tab.
        how: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        for event in (page.load, widget.next, written.input):
            event(show, inputs=written, outputs=[prompt, widget, *cards], **how)
    return page.queue(api_open=False)


def _card(slot: int) -> gr.Markdown:
    with gr.Column(elem_classes="card"):
        gr.HTML(
            html_template=_CARD_HEAD.format(letter=LETTERS[slot], slot=slot), js_on_load=None, apply_default_css=False
        )
        return gr.Markdown(line_breaks=True, elem_id=f"card-{LETTERS[slot]}", elem_classes="card-text")


def _shown(service: LabelService, annotator: str, slots: int, written: bool = False) -> list[Any]:
    """Prompt, widget and cards of the annotator's task; with `written`, texts to the letter."""
    task = service.next_task(annotator)
    state = asdict(service.progress(annotator)) | {"wordings": FLAGS}
    if task is None:
        return [FINISHED, state | {"id": None, "key": "", "draft": "", "count": 0}, *[""] * slots]
    form = as_written if written else as_markdown
    texts = [form(text) if text.strip() else "*(empty)*" for text in task.completions]
    return [prompt_markdown(task.prompt, form), state | _widget_state(task), *texts, *[""] * (slots - len(texts))]


def _widget_state(task: Task) -> dict[str, Any]:
    """What the widget may know: numbers, what the annotator said before, and the name of the browser's draft of it."""
    return {
        "id": task.id,
        "key": task.key,
        "draft": digest(repr((task.id, task.prompt, task.completions))),
        "count": len(task.completions),
        "before": None if task.before is None else asdict(task.before),
    }


def prompt_markdown(prompt: Prompt, form: Callable[[str], str]) -> str:
    """A prompt for reading; the turns of a conversation are headed by who speaks."""
    if isinstance(prompt, str):
        return form(prompt)
    return "\n\n".join(f"**{as_markdown(turn['role'])}**\n\n{form(turn['content'])}" for turn in prompt)


def as_markdown(text: str) -> str:
    """Model text as Markdown in which HTML and images are shown as written; code keeps its characters."""
    parts = re.split(_CODE, text)
    parts[::2] = [_inert(part) for part in parts[::2]]  # every second part is code
    return "".join(parts).strip()


def as_written(text: str) -> str:
    """Model text as a Markdown block in which every character stands for itself."""
    fence = "~" * (1 + max([2, *(len(run) for run in re.findall("~+", text))]))
    return f"{fence}text\n{text}\n{fence}"


def _inert(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!&#91;")


_CODE = re.compile(r"(^ {0,3}(?:```|~~~).*?(?:^ {0,3}(?:```|~~~)|\Z)|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)

_HEADER = """<div class="top"><h1>Rank completions</h1><div class="progress-box">
<span class="progress-text">&nbsp;</span><progress value="0" max="1"></progress></div></div>"""

_CARD_HEAD = """<div class="card-head"><span class="card-letter">{letter}</span>
<div class="card-picks" data-slot="{slot}" role="group" aria-label="Rank of completion {letter}"></div></div>"""

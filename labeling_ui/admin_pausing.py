"""The annotators' tab: everybody's numbers, and a way to pause somebody that asks once more."""

from __future__ import annotations

from typing import Any

import gradio as gr

from labeling_ui import admin_html
from labeling_ui.admin import Admin
from labeling_ui.admin_events import EVENT, HIDE, asked, board
from labeling_ui.admin_parts import notice
from labeling_ui.person import Person
from rlhf.figures import text
from rlhf.types import DataError


def build(admin: Admin, tab: gr.Tab) -> None:
    """Fill the tab."""
    handlers = _Pausing(admin)
    numbers, again = board(tab, "annotators", handlers.numbers)
    said = gr.HTML(elem_id="pause-notice")
    with gr.Row(elem_id="pausing", equal_height=True):
        # any text is let through to the use case, which knows who there is
        who = gr.Dropdown([], label="Pause or resume an annotator", allow_custom_value=True, value=None)
        pause, resume = gr.Button("Pause ..."), gr.Button("Resume ...")
    with gr.Row(visible=False, elem_id="sure", equal_height=True) as sure:
        question = gr.HTML()
        yes_pause = gr.Button("Yes, pause", variant="stop", visible=False)
        yes_resume = gr.Button("Yes, resume", variant="primary", visible=False)
        no = gr.Button("No")
    asking = [sure, question, yes_pause, yes_resume, said]
    for event in (tab.select, again.click):
        event(asked(handlers.people), outputs=who, **EVENT)
    pause.click(asked(handlers.ask_to_pause), who, asking, **EVENT)
    resume.click(asked(handlers.ask_to_resume), who, asking, **EVENT)
    yes_pause.click(asked(handlers.pause), who, [sure, said, numbers], **EVENT)
    yes_resume.click(asked(handlers.resume), who, [sure, said, numbers], **EVENT)
    for event in (no.click, who.change):  # whoever is paused is whom the question names
        event(asked(handlers.leave), outputs=sure, **EVENT)


class _Pausing:
    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    def numbers(self, me: Person) -> str:
        return admin_html.annotators(self._admin.people(me), self._admin.paused(me))

    def people(self, me: Person) -> Any:
        return gr.update(choices=list(self._admin.paused(me)))

    def ask_to_pause(self, me: Person, name: str | None) -> list[Any]:
        return self._question(me, name, "gets no more items; what they have begun is kept", paused=True)

    def ask_to_resume(self, me: Person, name: str | None) -> list[Any]:
        return self._question(me, name, "gets items again", paused=False)

    def _question(self, me: Person, name: str | None, what: str, *, paused: bool) -> list[Any]:
        known = self._admin.paused(me)
        if name not in known:
            none = "Choose somebody who has an account." if known else "Nobody has an account on this page."
            return [gr.update(**HIDE), "", gr.update(), gr.update(), notice(none, good=False)]
        line = f"<p><b>{text(name)}</b> {what}. Are you sure?</p>"
        return [gr.update(visible=True), line, gr.update(visible=paused), gr.update(visible=not paused), ""]

    def pause(self, me: Person, name: str | None) -> list[Any]:
        return self._set(me, name or "", paused=True)

    def resume(self, me: Person, name: str | None) -> list[Any]:
        return self._set(me, name or "", paused=False)

    def _set(self, me: Person, name: str, *, paused: bool) -> list[Any]:
        try:
            self._admin.pause(me, name, paused)
        except DataError as error:
            return [gr.update(**HIDE), notice(str(error), good=False), gr.update()]
        return [gr.update(**HIDE), notice(f"{name} {'is paused' if paused else 'gets items again'}."), self.numbers(me)]

    def leave(self, me: Person) -> Any:
        self._admin.check(me)
        return gr.update(**HIDE)

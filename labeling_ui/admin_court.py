"""The disputes' tab: items on which annotators differ, the blind cards of one of them, and the last word on it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from labeling_ui import admin_html
from labeling_ui.admin import Admin
from labeling_ui.admin_events import EVENT, HIDE, asked, board, picked
from labeling_ui.admin_parts import notice
from labeling_ui.letters import parsed, written
from labeling_ui.person import Person
from labeling_ui.said import FLAGS, MAX_RATIONALE
from rlhf.types import DataError

_PICK = """element.addEventListener("click", (event) => {
  const item = event.target.closest("[data-item]");
  if (item) trigger("pick", item.dataset.item);
});"""
"""A click on an item of the list opens it."""

_SHOW = """() => { document.getElementById("case")?.scrollIntoView({ behavior: "smooth" }); }"""

HOW = "> for better, = for equal, / before those set aside, as in B > A = D / C"


def build(admin: Admin, tab: gr.Tab) -> None:
    """Fill the tab."""
    handlers = _Court(admin)
    with gr.Row(elem_id="opening", equal_height=True):
        which = gr.Textbox(label="Item to adjudicate", placeholder="such as 12", max_lines=1, max_length=20)
        open_, first = gr.Button("Open this item"), gr.Button("Open the most doubtful one", variant="primary")
    said = gr.HTML(elem_id="dispute-notice")
    with gr.Column(visible=False, elem_id="case") as column:
        cards = gr.HTML(elem_id="case-cards")
        shown, key = gr.Textbox(visible=False), gr.Textbox(visible=False)
        order = gr.Textbox(label="Your ranking, best first", info=HOW, max_lines=1, max_length=200, elem_id="order")
        why = gr.Textbox(label="Why (optional)", lines=2, max_length=MAX_RATIONALE)
        flags = gr.CheckboxGroup([(wording, name) for name, wording in FLAGS.items()], label="Flags")
        with gr.Row():
            submit = gr.Button("Save as the last word", variant="primary")
            look = gr.Button("Show what the annotators said")
            undo = gr.Button("Take back the adjudication")
        others = gr.HTML(elem_id="statements")
    listed, _again = board(tab, "disputes", handlers.listed, js_on_load=_PICK)
    case = [column, cards, shown, key, order, why, flags, others, said]
    for event in (open_.click, which.submit):
        event(asked(handlers.open), which, case, **EVENT)
    opened = listed.pick(picked(handlers.open), None, case, **EVENT)
    opened.then(None, js=_SHOW, **EVENT)
    first.click(asked(handlers.open_first), None, case, **EVENT)
    for event in (submit.click, order.submit):
        event(asked(handlers.save), [shown, key, order, why, flags], [column, listed, said], **EVENT)
    look.click(asked(handlers.reveal), shown, [others, said], **EVENT)
    undo.click(asked(handlers.take_back), shown, [column, listed, said], **EVENT)


class _Court:
    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    def listed(self, me: Person) -> str:
        return admin_html.disputes(self._admin.disputed(me))

    def open_first(self, me: Person) -> list[Any]:
        left = [each.item_id for each in self._admin.disputed(me) if each.adjudicated_by is None]
        return self.open(me, str(left[0])) if left else _closed(notice("Nothing is left to adjudicate."))

    def open(self, me: Person, item: str) -> list[Any]:
        try:
            found = self._admin.case(me, _number(item))
        except DataError as error:
            return _closed(notice(str(error), good=False))
        before = found.before
        own = ["", "", []]
        if before is not None:
            own = [written(before), before.rationale or "", [name for name in FLAGS if before.flags.get(name)]]
        return [gr.update(visible=True), admin_html.case(found), str(found.item_id), found.key, *own, "", ""]

    def save(self, me: Person, item: str, key: str, ranking: str, why: str, flags: list[str]) -> list[Any]:
        try:
            number = _number(item)
            tiers, aside = parsed(ranking, len(self._admin.case(me, number).completions))
            raised = dict.fromkeys(flags, True)
            self._admin.adjudicate(me, number, key, tiers, aside, flags=raised, rationale=why)
        except DataError as error:
            return _kept(error)
        return self._done(me, f"Saved: your ranking is the last word on item {number}.")

    def reveal(self, me: Person, item: str) -> list[Any]:
        try:
            return [admin_html.statements(self._admin.reveal(me, _number(item))), ""]
        except DataError as error:
            return ["", notice(str(error), good=False)]

    def take_back(self, me: Person, item: str) -> list[Any]:
        try:
            number = _number(item)
            stood = self._admin.take_back(me, number)
        except DataError as error:
            return _kept(error)
        if not stood:
            return self._done(me, f"Nobody had adjudicated item {number}.")
        return self._done(me, f"The annotators' rankings of item {number} count again.")

    def _done(self, me: Person, message: str) -> list[Any]:
        return [gr.update(**HIDE), self.listed(me), notice(message)]


def _closed(message: str) -> list[Any]:
    return [gr.update(**HIDE), "", "", "", "", "", [], "", message]


def _kept(error: DataError) -> list[Any]:
    """The case stays open, and the message says what is wrong."""
    return [gr.update(), gr.update(), notice(str(error), good=False)]


def _number(written: str) -> int:
    """The number of an item as somebody typed it. Raises DataError."""
    bare = (written or "").strip().removeprefix("#")
    if not bare.isascii() or not bare.isdecimal() or len(bare) > 15:
        raise DataError("write the number of an item, such as 12")
    return int(bare)

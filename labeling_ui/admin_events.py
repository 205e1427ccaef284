"""How the admin page's events are handled: unqueued, unlisted, and for the person whom the gate let in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from labeling_ui.person import Person, person_of

EVENT: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "minimal"}
"""Not queued: what waits in Gradio's queue dies with the tab, and is tied to a number that the browser makes up."""

HIDE: dict[str, Any] = {"visible": False}


def asked(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler(person, *values of the inputs)` as Gradio calls it. The person is the gate's word, not the page's."""

    def handle(request: gr.Request, *values: Any) -> Any:
        sent = request.request
        if sent is None:
            raise PermissionError("this event came without a request")
        return handler(person_of(sent.scope), *values)

    return handle


def picked(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler(person, text)` of what the page's script says was picked: a text that anybody may have written."""

    def handle(request: gr.Request, event: gr.EventData) -> Any:
        return asked(handler)(request, str(event._data))

    return handle


def board(
    tab: gr.Tab, name: str, show: Callable[[Person], str], js_on_load: str | None = None
) -> tuple[gr.HTML, gr.Button]:
    """HTML that is made when its tab opens, and by the button."""
    again = gr.Button("Refresh", size="sm", elem_classes="again")
    html = gr.HTML(elem_id=f"{name}-board", js_on_load=js_on_load)
    for event in (tab.select, again.click):
        event(asked(show), outputs=html, **EVENT)
    return html, again

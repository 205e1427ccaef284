"""The page for admins, a Gradio app of its own: queue, agreement, annotators, disputes, data.

Names, notes and model text are hostile. They reach the browser as escaped HTML that `admin_html.py` made, in the value
of a component, never in a template; and as values of text boxes and menus, which show text. Who asks comes from the
gate's scope at every event, never from the page, and `Admin` looks at the role once more.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from labeling_ui import admin_court, admin_html, admin_pausing
from labeling_ui.admin import Admin
from labeling_ui.admin_events import EVENT, asked, board
from labeling_ui.admin_routes import EXPORT
from labeling_ui.downloads import DOWNLOADS
from rlhf.figures import text

STYLE = Path(__file__).parent / "static" / "admin.css"

REFRESH = 10
"""Seconds between two looks at the queue."""


def build(admin: Admin) -> gr.Blocks:
    """The page; `head()` belongs into its head."""
    with gr.Blocks(title="Administration", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>Administration</h1>", elem_id="title")
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Queue", id="queue"):
                _queue(admin, page)
            with gr.Tab("Agreement", id="agreement") as tab:
                board(tab, "agreement", lambda me: admin_html.agreement(admin.together(me)))
            with gr.Tab("Annotators", id="annotators") as tab:
                admin_pausing.build(admin, tab)
            with gr.Tab("Disputes", id="disputes") as tab:
                admin_court.build(admin, tab)
            with gr.Tab("Data", id="data"):
                gr.HTML(_downloads(), elem_id="data-board")
    return page.queue(api_open=False)


def head() -> str:
    """The page's style."""
    return f"<style>{STYLE.read_text(encoding='utf-8')}</style>"


def _queue(admin: Admin, page: gr.Blocks) -> None:
    html = gr.HTML(elem_id="queue-board")
    show = asked(lambda me: admin_html.queue(admin.overview(me)))
    page.load(show, outputs=html, **EVENT)
    gr.Timer(REFRESH).tick(show, outputs=html, **{**EVENT, "show_progress": "hidden"})


def _downloads() -> str:
    """Links to our own routes, which look at the role; nothing in it comes from anybody."""
    links = "".join(
        f'<li><a href="..{EXPORT}/{name}" download>{name}</a><p>{text(about)}</p></li>'
        for name, about in DOWNLOADS.items()
    )
    return f'<ul class="downloads">{links}</ul>'

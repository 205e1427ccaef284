"""Gradio pages behind our own gate, and the server that answers for them."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from gradio.themes import Soft

from labeling_ui.doors import OTHER, Doors
from labeling_ui.first_script import FirstScript
from labeling_ui.gate import Gate
from labeling_ui.person import PERSON, Person, Role
from labeling_ui.site import HERE, LOOPBACK, Site
from rlhf.types import ConfigError

MAX_STATES = 500
"""Open pages whose state Gradio keeps."""

CLOSING_SECONDS = 1
"""What a request that is under way gets when the server ends."""


def check_host(host: str) -> None:
    """Refuse to be reached from elsewhere: there is no login. Raises ConfigError."""
    if host not in LOOPBACK:
        raise ConfigError(
            f"host is {host!r}, but the page has no login and may be reached from this machine only: use one of "
            f"{', '.join(LOOPBACK)}, and from another machine a tunnel (ssh -L 7860:localhost:7860)"
        )


def application(*, site: Site = HERE, doors: Doors = OTHER, first: str | None = None, **gate: Any) -> FastAPI:
    """An application without routes behind a gate; by default one for whoever sits at this machine.

    `first` is a script that its page at the root runs before all others.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    # With a CORS middleware on the parent, Gradio adds none of its own, which reflects any origin.
    app.add_middleware(CORSMiddleware, allow_origins=[], allow_methods=["GET", "POST"])
    if first is not None:
        app.add_middleware(FirstScript, script=first)
    app.add_middleware(Gate, site=site, doors=doors, **(gate or {"person": Person("me", "annotator")}))
    return app


def mount(
    app: FastAPI,
    page: gr.Blocks,
    *,
    head: str,
    data: Path | None = None,
    path: str = "/",
    role: Role = "annotator",
) -> FastAPI:
    """Put a Gradio page behind the application's own routes; `data` is a folder that it must never serve.

    Styles belong into `head`: Gradio rewrites the rules of its `css` and loses their media queries. Its `root_path`
    stays unset: a full address there breaks a page that is not at `/`, and the gate has set the request's own.
    """
    font = ["system-ui", "sans-serif"]
    page.state_session_capacity = MAX_STATES
    return gr.mount_gradio_app(
        app,
        page,
        path=path,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        auth_dependency=partial(_name, role),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        mcp_server=False,
        ssr_mode=False,
        max_file_size="1kb",
        allowed_paths=[],
        blocked_paths=[str(data.resolve())] if data else [],
        theme=Soft(primary_hue="indigo", font=font, font_mono=["ui-monospace", "monospace"]),
        head=head,
    )


def _name(role: Role, request: Request) -> str | None:
    """Gradio's own check, behind the gate's: None answers 401."""
    person = request.scope.get(PERSON)
    if isinstance(person, Person) and (role == "annotator" or person.role == "admin"):
        return person.name
    return None


def listen(host: str, port: int, *, login: bool = False) -> socket.socket:
    """A socket to serve on; port 0 takes a free one. Without `login`, of this machine alone. Raises ConfigError."""
    if not login:
        check_host(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}): choose another with --port"
        ) from error


def address(listener: socket.socket) -> str:
    """What a person types into the browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer until a signal ends it, in this one process: Gradio keeps its sessions in it.

    An open page holds a connection for good, so what is still going on one second after the signal is cut off.
    """
    _draw_nowhere()
    # what a proxy says is the gate's to believe
    how: dict[str, Any] = {"proxy_headers": False, "server_header": False}
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS, **how)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    uvicorn.Server(config).run(sockets=[listener])


def _draw_nowhere() -> None:
    """Choose matplotlib's backend now: Gradio asks for it at each event, and the first would wait a second for it."""
    import matplotlib

    matplotlib.use("agg")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to print it: that a page was open when the server ended is nothing to worry about."""
    cut_off = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut_off and "graceful shutdown exceeded" not in record.getMessage()

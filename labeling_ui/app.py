"""The web server: our own routes and rules in front, the Gradio page behind them. For this machine only."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from gradio.themes import Soft
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labeling_ui import rank_view
from labeling_ui.service import LabelService
from rlhf.config import LabelConfig
from rlhf.types import ConfigError, DataError, UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

MAX_BODY = 1_000_000
"""Bytes of one request."""

SECURITY_HEADERS = {
    # Gradio needs inline scripts and eval; the rest keeps what a completion may smuggle in from reaching out.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def check_host(host: str) -> None:
    """Refuse to be reached from elsewhere: there is no login. Raises ConfigError."""
    if host not in LOOPBACK:
        raise ConfigError(
            f"host is {host!r}, but the page has no login and may be reached from this machine only: use one of "
            f"{', '.join(LOOPBACK)}, and from another machine a tunnel (ssh -L 7860:localhost:7860)"
        )


def create(
    service: LabelService, annotator: str, *, slots: int, guidelines: str | None = None, data: Path | None = None
) -> FastAPI:
    """The whole application for one annotator; `data` is a folder that the page must never serve."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # With a CORS middleware on the parent, Gradio adds none of its own, which reflects any origin.
    app.add_middleware(CORSMiddleware, allow_origins=[], allow_methods=["GET", "POST"])
    app.add_middleware(Shield)
    app.add_exception_handler(UserError, _refused)
    _add_routes(app, service, annotator)
    page = rank_view.build(service, annotator, slots=slots, guidelines=guidelines or rank_view.WELCOME)
    font = ["system-ui", "sans-serif"]
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
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
        # In the head rather than as `css`, whose rules Gradio rewrites and whose media queries it loses.
        head=f"<style>{(rank_view.STATIC / 'rank.css').read_text(encoding='utf-8')}</style>",
    )


def serve(service: LabelService, config: LabelConfig, opened: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `opened` is told its address. Raises ConfigError or DataError."""
    check_host(config.host)
    slots = max(len(item.completions) for item in service.store.items(config.round))
    if slots > len(rank_view.LETTERS):
        raise DataError(f"an item has {slots} completions; the page can show {len(rank_view.LETTERS)}")
    app = create(service, config.annotator, slots=slots, guidelines=_guidelines(config), data=Path(config.store).parent)
    with _listen(config.host, config.port) as listener:
        name = f"[{config.host}]" if ":" in config.host else config.host
        opened(f"http://{name}:{listener.getsockname()[1]}")
        # One process: Gradio keeps its sessions in it.
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error.strerror}): choose another with --port"
        ) from error


def _guidelines(config: LabelConfig) -> str | None:
    try:
        return Path(config.guidelines).read_text(encoding="utf-8") if config.guidelines else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"guidelines is {config.guidelines!r}, which cannot be read: {error}") from error


class Submission(BaseModel):
    """What the page sends; places on the page count from 0."""

    model_config = ConfigDict(strict=True, extra="forbid")

    task: int
    key: str
    tiers: list[list[int]]
    aside: list[int] = []
    flags: dict[str, bool] = {}
    rationale: str | None = None
    seconds: float | None = None


class TaskName(BaseModel):
    """Which task a request is about."""

    model_config = ConfigDict(strict=True, extra="forbid")

    task: int


def _add_routes(app: FastAPI, service: LabelService, annotator: str) -> None:
    @app.get("/healthz")
    def health() -> dict[str, Any]:
        return {"ok": True}

    @app.post("/api/v1/submit")
    def submit(said: Submission) -> dict[str, Any]:
        more = {"flags": said.flags, "rationale": said.rationale, "seconds": said.seconds}
        receipt = service.submit(annotator, said.task, said.key, said.tiers, said.aside, **more)
        return {"saved": True, "ranking": receipt.ranking_id, "repeated": receipt.repeated}

    @app.post("/api/v1/skip")
    def skip(about: TaskName) -> dict[str, Any]:
        service.skip(annotator, about.task)
        return {"skipped": about.task}

    @app.post("/api/v1/undo")
    def undo() -> dict[str, Any]:
        return {"task": service.undo(annotator)}


def _refused(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=400)


class Shield:
    """Security headers on every answer; no request from another site, under another name, or of absurd size.

    Without a login, the browser on this machine is the way in: a foreign page may send requests here, and a foreign
    name may be made to point here (DNS rebinding). Plain ASGI, because streamed answers must pass through.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        problem = _problem(scope["method"], Headers(scope=scope))
        if problem is not None:
            status, text = problem
            return await JSONResponse({"error": text}, status_code=status)(scope, receive, _with_headers(send))
        await self._app(scope, receive, _with_headers(send))


def _problem(method: str, headers: Headers) -> tuple[int, str] | None:
    """(status, why) for a request that is turned away."""
    host = headers.get("host", "")
    if urlsplit(f"//{host}").hostname not in LOOPBACK:
        return 421, "this page answers to this machine's own name only"
    origin = headers.get("origin")
    if method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != host:
        return 403, "requests from other sites are refused"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        return 413, f"a request may have {MAX_BODY} bytes"
    return None


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SECURITY_HEADERS)
        await send(message)

    return wrapped

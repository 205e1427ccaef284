"""Gradio pages for this machine only: our own rules stand in front of everything that Gradio answers."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from gradio.themes import Soft
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.types import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

MAX_BODY = 1_000_000
"""Bytes of one request."""

CLOSING_SECONDS = 1
"""What a request that is under way gets when the server ends."""

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


def application() -> FastAPI:
    """An application without routes that answers this machine's own pages only."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # With a CORS middleware on the parent, Gradio adds none of its own, which reflects any origin.
    app.add_middleware(CORSMiddleware, allow_origins=[], allow_methods=["GET", "POST"])
    app.add_middleware(Shield)
    return app


def mount(app: FastAPI, page: gr.Blocks, *, head: str, data: Path | None = None) -> FastAPI:
    """Put a Gradio page behind the application's own routes; `data` is a folder that it must never serve.

    Styles belong into `head`: Gradio rewrites the rules of its `css` and loses their media queries.
    """
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
        head=head,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket of this machine; port 0 takes a free one. Raises ConfigError for another host or a port in use."""
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
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    uvicorn.Server(config).run(sockets=[listener])


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to print it: that a page was open when the server ended is nothing to worry about."""
    cut_off = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut_off and "graceful shutdown exceeded" not in record.getMessage()


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

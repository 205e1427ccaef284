"""The gate in front of everything: plain ASGI, so that streamed answers pass through it unbuffered.

It finds out who asks and leaves the `Person` in the scope; nothing behind it needs to trust a header, a cookie or a
value of the page. Requests are refused in this order: strange path, foreign host, foreign origin, no such door, too
many, not logged in, wrong role, no CSRF token, too large.
"""

from __future__ import annotations

import hmac
import logging
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labeling_ui.auth import Accounts, Session
from labeling_ui.doors import FORMS, Doors, canonical
from labeling_ui.forms import problem_page
from labeling_ui.limits import MAX_BODY, Limits, RateLimit, TooLarge, network, whole
from labeling_ui.person import PERSON, Person
from labeling_ui.site import CSRF, SESSION, Site
from rlhf.types import UserError

READS = ("GET", "HEAD")

TOKEN = "rlhf.csrf"
"""Where the session's CSRF token stands in the scope; None where there is no login."""

SECURITY_HEADERS = {
    # Gradio needs inline scripts and eval; the rest keeps what a completion may smuggle in from reaching out.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # `no-referrer` would make browsers hide the origin of our own forms, too
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

HSTS = {"Strict-Transport-Security": "max-age=31536000"}

UNTRUSTED = (b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-for", b"x-gradio-server", b"forwarded")
"""Headers that Gradio would believe whoever sends them; none reaches it."""


class Refusal(Exception):
    """A request that is turned away, and the answer to it."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.headers = status, dict(headers or {})


class Gate:
    """Lets requests through to `app`. Without `accounts` everybody who reaches it is `person`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        site: Site,
        doors: Doors,
        accounts: Accounts | None = None,
        person: Person | None = None,
        limits: Limits | None = None,
    ) -> None:
        if (accounts is None) == (person is None):
            raise ValueError("either accounts or one person")
        self._app, self._site, self._doors = app, site, doors
        self._accounts, self._person = accounts, person
        self._limits = limits or Limits()
        self._headers = SECURITY_HEADERS | (HSTS if site.https else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope, headers = self._cleaned(scope), Headers(scope=scope)
        send = _with_headers(send, self._headers, kept=_is_file(scope["path"]))
        try:
            scope = await self._admitted(scope, headers)
            if scope["method"] not in READS:
                receive = await _received(receive, headers)
        except Refusal as refusal:
            return await self._refuse(refusal, scope, headers)(scope, receive, send)
        await self._app(self._public(scope), receive, send)

    def _cleaned(self, scope: Scope) -> Scope:
        """A copy in which nothing is claimed: no person, no proxy's word, and the path without the public prefix."""
        headers = Headers(scope=scope)
        peer = (scope.get("client") or ("unknown", 0))[0]
        kept = [(name, value) for name, value in scope["headers"] if name.lower() not in UNTRUSTED]
        cleaned = {key: value for key, value in scope.items() if key != PERSON}
        cleaned |= {"headers": kept, "root_path": "", "client": (self._site.client(headers, peer), 0)}
        prefix = self._site.prefix
        if prefix and (scope["path"] == prefix or scope["path"].startswith(prefix + "/")):
            cleaned["path"] = scope["path"][len(prefix) :] or "/"
            if scope.get("raw_path") is not None:
                cleaned["raw_path"] = scope["raw_path"][len(prefix) :] or b"/"
        return cleaned

    def _public(self, scope: Scope) -> Scope:
        """With the address as the browser knows it, of which Gradio makes its links. The prefix is ASGI's root path."""
        prefix, path = self._site.prefix, scope["path"]
        full = {"root_path": prefix, "path": prefix + path, "raw_path": (prefix + path).encode()}
        return {**scope, **full, "scheme": "https" if self._site.https else "http"}

    async def _admitted(self, scope: Scope, headers: Headers) -> Scope:
        """The scope with its person. Raises Refusal."""
        method, path, address = scope["method"], scope["path"], network(scope["client"][0])
        if not canonical(path, scope.get("raw_path")):
            raise Refusal(404, "there is no such page")
        if not self._site.knows(headers.get("host", "")) and (path != "/healthz" or self._accounts is None):
            raise Refusal(421, "this page does not answer to this name")
        if method not in READS and not self._site.sent(headers):
            raise Refusal(403, "requests from other sites are refused")
        door = self._doors.of(method, path)
        if door is None:
            raise Refusal(404, "there is no such page")
        if method not in READS:
            self._slow_down(self._limits.writing_from, address)
        if door == "open":
            if method not in READS:
                self._slow_down(self._limits.entering, address)
            return scope
        session = await self._session(headers)
        if door == "admin" and session.person.role != "admin":
            raise Refusal(403, "this is for admins")
        if method not in READS:
            self._check_csrf(session, path, headers)
            self._slow_down(self._limits.writing, session.person.name)
        return {**scope, PERSON: session.person, TOKEN: session.csrf}

    async def _session(self, headers: Headers) -> Session:
        if self._accounts is None:
            assert self._person is not None
            return Session(self._person, csrf=None)
        token = cookie(headers, self._site.cookie(SESSION))
        try:
            session = await run_in_threadpool(self._accounts.session, token)
        except UserError as error:
            raise Refusal(503, store_trouble(error, None)) from error
        if session is None:
            raise Refusal(401, "log in: you are not, or no longer, logged in")
        return session

    def _check_csrf(self, session: Session, path: str, headers: Headers) -> None:
        if session.csrf is None or path in FORMS:
            return
        if not same(headers.get("x-csrf-token", ""), session.csrf):
            raise Refusal(403, "this page is out of date: reload it")

    def _slow_down(self, limit: RateLimit, key: str) -> None:
        if self._accounts is None:
            return  # one person, on the machine itself
        wait = math.ceil(limit.wait(key))
        if wait:
            raise Refusal(429, f"too many requests: wait {wait} s", {"Retry-After": str(wait)})

    def _refuse(self, refusal: Refusal, scope: Scope, headers: Headers) -> Response:
        """JSON, but for a person whose browser asks for a page: words, or the login, and from there back."""
        if "text/html" not in headers.get("accept", ""):
            return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)
        if refusal.status != 401:
            return problem_page(str(refusal), refusal.status, self._site.prefix, refusal.headers)
        page = scope["method"] in READS and scope["path"] != "/"
        wanted = f"?next={quote(scope['path'])}" if page else ""
        return RedirectResponse(f"{self._site.prefix}/login{wanted}", 303)


async def _received(receive: Receive, headers: Headers) -> Receive:
    """The body, all of it, before anything works on it. Raises Refusal."""
    length = headers.get("content-length", "0")
    try:
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise TooLarge
        return await whole(receive)
    except TooLarge:
        raise Refusal(413, f"a request may have {MAX_BODY} bytes", {"Connection": "close"}) from None
    except TimeoutError:
        raise Refusal(408, "the request took too long to arrive", {"Connection": "close"}) from None


def cookie(headers: Headers, name: str) -> str | None:
    """The value of one cookie."""
    return cookie_parser(headers.get("cookie", "")).get(name)


def same(given: str, kept: str) -> bool:
    """Whether two tokens are one, in a time that tells nothing about where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), kept.encode())


def store_trouble(error: Exception, person: object) -> str:
    """What a person gets to know of trouble with the store: admins all of it, others no paths."""
    if isinstance(person, Person) and person.role == "admin":
        return str(error)
    logging.getLogger("uvicorn.error").error("%s", error)
    return "nothing was saved: the store cannot be reached as things are. Try again soon, or tell whoever runs this"


def _is_file(path: str) -> bool:
    """Whether it is a file, Gradio's or ours, which browsers may keep and ask after."""
    return path.removeprefix("/admin").startswith(("/assets/", "/static/", "/page/", "/theme.css", "/favicon.ico"))


def _with_headers(send: Send, wanted: Mapping[str, str], *, kept: bool) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in wanted.items():
                headers.setdefault(name, value)
            if not kept:
                headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return wrapped


def set_session(response: Response, site: Site, token: str, csrf: str, seconds: float) -> None:
    """Both cookies of a new session.

    A script may read the CSRF token and that is its purpose: other sites cannot read it, nor send it as a header. It is
    compared with the store, not with the cookie, and without the session's cookie it is worth nothing.
    """
    how: dict[str, Any] = {"max_age": int(seconds), "path": "/", "secure": site.https, "samesite": "strict"}
    response.set_cookie(site.cookie(SESSION), token, httponly=True, **how)
    response.set_cookie(site.cookie(CSRF), csrf, **how)


def drop_session(response: Response, site: Site) -> None:
    """Have the browser forget both."""
    for name in (SESSION, CSRF):
        response.delete_cookie(site.cookie(name), path="/", secure=site.https, samesite="strict")

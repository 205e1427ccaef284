"""Which requests are let through to whom. What is not written here is not there, whatever a library adds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Door = Literal["open", "person", "admin"]

FILES = ("GET /assets/*", "GET /static/*", "GET /theme.css", "GET /favicon.ico")
"""Gradio's own scripts, styles and fonts. A star stands for the rest of a path."""

ENTRANCE = ("GET /login", "POST /login", "GET /join", "POST /join")

PAGE = (
    *("GET /", "GET /config", "GET /gradio_api/info", "GET /gradio_api/heartbeat/*", "GET /gradio_api/startup-events"),
    "POST /gradio_api/run/predict",
)
"""What a Gradio page needs whose events are not queued."""

QUEUE = (
    *("POST /gradio_api/queue/join", "GET /gradio_api/queue/data", "POST /gradio_api/cancel", "POST /gradio_api/reset"),
)
"""What queued events need. Gradio ties a queue to a number that the browser makes up, not to a person: these are for
pages on which everybody may see what the others see."""

API = ("GET /api/v1/*", "POST /api/v1/*")
ACCOUNT = ("POST /logout", "GET /password", "POST /password")

ADMIN = (
    "GET /admin",
    *(each.replace(" ", " /admin", 1) for each in (*PAGE, *FILES)),
    *("GET /api/v1/admin/*", "POST /api/v1/admin/*"),
)

FORMS = ("/login", "/join", "/password", "/logout")
"""Their own forms carry the CSRF token as a field, which their routes look at: a form can send no header."""


@dataclass(frozen=True)
class Doors:
    """Patterns `METHOD /path`, the stricter role first: what is an admin's is nobody else's."""

    admin: tuple[str, ...] = ()
    person: tuple[str, ...] = ()
    open: tuple[str, ...] = ()

    def of(self, method: str, path: str) -> Door | None:
        """Who may pass; None: nobody, there is nothing."""
        method = "GET" if method == "HEAD" else method
        if _fits(self.admin, method, path):
            return "admin"
        if _fits(self.person, method, path):
            return "person"
        return "open" if _fits(self.open, method, path) else None


PUBLIC = ("GET /healthz", "GET /page/*", *FILES)

TOGETHER = Doors(ADMIN, (*PAGE, *API, *ACCOUNT), (*PUBLIC, *ENTRANCE))
"""`rlhf label` with accounts."""

ALONE = Doors(ADMIN, (*PAGE, *API), PUBLIC)
"""`rlhf label` for the one person at this machine."""

OTHER = Doors((), (*PAGE, *QUEUE), FILES)
"""A page of another command, for the one person at this machine."""


def _fits(patterns: Iterable[str], method: str, path: str) -> bool:
    for pattern in patterns:
        allowed, _, wanted = pattern.partition(" ")
        same = path.startswith(wanted[:-1]) if wanted.endswith("*") else path == wanted
        if allowed == method and same:
            return True
    return False


def canonical(path: str, raw: bytes | None) -> bool:
    """Whether a path is written in the one way that every layer reads alike: nothing encoded, doubled or climbing."""
    if raw is not None and raw.partition(b"?")[0] != path.encode("utf-8", "surrogateescape"):
        return False
    if not re.fullmatch(r"/[!-~]*", path) or any(sign in path for sign in ("\\", "%", "//", ";")):
        return False
    return not {".", ".."} & set(path.split("/"))

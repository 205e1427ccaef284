"""Requests by raw ASGI calls, and an application that only keeps what reaches it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from labeling_ui.person import PERSON, Person
from tests import own_loop


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]


@dataclass
class Behind:
    """The application behind the gate: it keeps what reaches it."""

    scopes: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        message = await receive() if scope["method"] == "POST" else {}
        self.bodies.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"in"})

    @property
    def person(self) -> Person | None:
        return self.scopes[-1].get(PERSON)


def ask(
    gate: Any,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    *,
    body: list[bytes] | None = None,
    raw: bytes | None = None,
    client: str = "10.0.0.7",
    more: dict[str, Any] | None = None,
) -> Answer:
    """One request, with nothing normalised by a client."""
    given = {"host": "label.example.org", **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode() if raw is None else raw,
        "query_string": b"",
        "scheme": "http",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": (client, 1234),
        **(more or {}),
    }
    chunks, sent = list(body or [b""]), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    own_loop.run(gate(scope, receive, send))
    start = next(message for message in sent if message["type"] == "http.response.start")
    heads = [(name.decode().lower(), value.decode()) for name, value in start["headers"]]
    text = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return Answer(start["status"], heads, text)

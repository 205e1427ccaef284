"""One annotator's browser, as far as the server can tell: the requests of the page over plain asyncio sockets.

It costs about a tenth of what the server spends on the same request, so that both fit on the same two cores.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

HOST = "label.example.org"
ORIGIN = f"https://{HOST}"
"""What the page is told to be its public address; the client stands where the proxy that speaks TLS would."""

ACCEPTS = "gzip, deflate, br"
TIMEOUT = 60.0
"""Seconds after which a request counts as unanswered."""


class RequestFailed(Exception):
    """An answer that is none, or says no. `answered` tells whether the server spoke at all."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


@dataclass(frozen=True)
class Answer:
    """Status, headers in lower case (the last of each name, but for cookies) and body."""

    status: int
    headers: dict[str, str]
    cookies: dict[str, str]
    body: bytes


@dataclass
class Line:
    """One kept-open connection: it sends one request after the other, and connects anew where it was closed."""

    port: int
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, request: bytes) -> Answer:
        """Send and read the answer. Raises RequestFailed where none comes."""
        async with self._turn:
            try:
                async with asyncio.timeout(TIMEOUT):
                    return await self._send(request)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.close()
                raise RequestFailed(f"no answer: {error!r}", answered=False) from error

    async def _send(self, request: bytes) -> Answer:
        kept = self._streams is not None
        try:
            return await self._exchange(request)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            # An idle connection that the server closed in this moment: browsers and proxies send such a request again.
            unheard = not isinstance(error, asyncio.IncompleteReadError) or not error.partial
            self.close()
            if not (kept and unheard):
                raise
            return await self._exchange(request)

    async def _exchange(self, request: bytes) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = self._streams
        writer.write(request)
        answer = await _read(reader)
        if answer.headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        """Let the connection go."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read(reader: asyncio.StreamReader) -> Answer:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    cookies: dict[str, str] = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        if name.lower() == "set-cookie":
            key, _, kept = value.strip().partition(";")[0].partition("=")
            cookies[key] = kept.strip('"')
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = await _chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(first.split()[1]), headers, cookies, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


@dataclass
class Visitor:
    """One person: a cookie jar, and a connection each for what the page does and for its drafts.

    `number` makes the address that the proxy writes down: people sit at machines of their own.
    """

    port: int
    number: int
    cookies: dict[str, str] = field(default_factory=dict)
    session_hash: str = field(default_factory=lambda: secrets.token_hex(6))
    next_event: int = 0
    """The number under which Gradio knows the event that shows the next item."""

    def __post_init__(self) -> None:
        self._line, self._drafts = Line(self.port), Line(self.port)

    async def join(self, invitation: str, password: str) -> None:
        """Make the invited account. Raises RequestFailed."""
        await self._form("/join", invite=invitation, password=password, again=password)

    async def login(self, name: str, password: str) -> None:
        """Begin a session. Raises RequestFailed."""
        self.cookies.clear()
        await self._form("/login", name=name, password=password, next="/")

    async def open_page(self) -> None:
        """Load what a browser loads, and find the event that shows the next item. Raises RequestFailed."""
        await self.get("/")
        config = json.loads((await self.get("/config")).body)
        self.next_event = next(
            each["id"] for each in config["dependencies"] for _, event in each["targets"] if event == "next"
        )

    async def hold_heartbeat(self) -> None:
        """What an open page keeps open; ends when it is cancelled or the server goes."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(self._request("GET", f"/gradio_api/heartbeat/{self.session_hash}"))
            while await reader.read(1 << 16):
                pass
        except OSError:
            pass

    async def next_task(self) -> dict[str, Any] | None:
        """The state of the page as the scripts get it: `id`, `key`, `count` ...; None when nothing is left."""
        event = {"data": [], "event_data": None, "fn_index": self.next_event, "session_hash": self.session_hash}
        answer = await self._post(self._line, "/gradio_api/run/predict", event | {"trigger_id": None})
        state = answer["data"][0]
        return state if state["screen"] == "rank" else None

    async def submit(self, task: int, key: str, tiers: list[list[int]], seconds: float) -> int:
        """The id of the ranking that the server says it saved. Raises RequestFailed."""
        said = {"task": task, "key": key, "tiers": tiers, "aside": [], "flags": {}, "seconds": round(seconds, 3)}
        return (await self._post(self._line, "/api/v1/submit", said))["ranking"]

    async def save_draft(self, task: int, tiers: list[list[int]]) -> None:
        """What the page does by itself while someone ranks. Raises RequestFailed."""
        await self._post(self._drafts, "/api/v1/draft", {"task": task, "body": {"tiers": tiers, "aside": []}})

    async def get(self, path: str) -> Answer:
        """A page or file. Raises RequestFailed."""
        answer = await self._line.send(self._request("GET", path))
        if answer.status != 200:
            raise RequestFailed(f"{path}: {answer.status} {answer.body[:300]!r}", answered=True)
        return answer

    def close(self) -> None:
        """Close the connections."""
        for line in (self._line, self._drafts):
            line.close()

    async def _form(self, path: str, **fields: str) -> None:
        body = urlencode(fields).encode()
        answer = await self._line.send(self._request("POST", path, body, "application/x-www-form-urlencoded"))
        self.cookies |= answer.cookies
        if answer.status != 303 or not any(name.endswith("session") for name in answer.cookies):
            raise RequestFailed(f"{path}: {answer.status} {answer.body[:300]!r}", answered=True)

    async def _post(self, line: Line, path: str, message: dict[str, Any]) -> dict[str, Any]:
        answer = await line.send(self._request("POST", path, json.dumps(message).encode(), "application/json"))
        if answer.status != 200:
            raise RequestFailed(f"{path}: {answer.status} {answer.body[:300]!r}", answered=True)
        return json.loads(answer.body)

    def _request(self, method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
        headers = {
            "Host": HOST,
            "Accept": "text/html" if kind.endswith("urlencoded") or method == "GET" else "*/*",
            "Accept-Encoding": ACCEPTS if kind == "application/json" else "identity",
            "X-Forwarded-For": f"10.0.{self.number // 250}.{self.number % 250 + 1}",
            "X-Forwarded-Proto": "https",
        }
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if method == "POST":
            token = next((value for name, value in self.cookies.items() if name.endswith("csrf")), "")
            headers |= {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin", "X-CSRF-Token": token}
            headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body

"""How often and how much: limits of requests per key, and of the bytes of one request."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Message, Receive

MAX_BODY = 1_000_000
"""Bytes of one request."""

BODY_SECONDS = 30
"""How long a request may take to arrive."""

MAX_KEYS = 20_000


class RateLimit:
    """A bucket of `burst` requests per key, filled up again within `seconds`. In this process's memory only."""

    def __init__(self, burst: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._rate, self._clock = burst, burst / seconds, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str) -> float:
        """Seconds until this key may ask again; 0 lets it through and counts."""
        now = self._clock()
        left, since = self._left.pop(key, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._left[key] = (left if wait else left - 1, now)
        if len(self._left) > MAX_KEYS:
            self._left.popitem(last=False)  # who has been silent longest has a full bucket anyway
        return wait


@dataclass(frozen=True)
class Limits:
    """What the gate counts. An address may stand for a whole room of people."""

    entering: RateLimit = field(default_factory=lambda: RateLimit(30, 300))
    """Logins and joins, per address; an account's own lockout is stricter."""
    writing: RateLimit = field(default_factory=lambda: RateLimit(240, 60))
    """Writes, per person."""
    writing_from: RateLimit = field(default_factory=lambda: RateLimit(3000, 60))
    """Writes, per address, whoever they come from."""


def network(address: str) -> str:
    """What counts as one address: of IPv6 the /64 that a single connection is given."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(parsed if parsed.version == 4 else ipaddress.ip_network((parsed, 64), strict=False))


class TooLarge(Exception):
    """A body beyond `MAX_BODY`."""


async def whole(receive: Receive) -> Receive:
    """Read a body to its end and hand it on in one piece. Raises TooLarge, or TimeoutError where it trickles."""
    parts, size = [], 0
    async with asyncio.timeout(BODY_SECONDS):
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return _first(message, receive)  # gone before it was sent
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise TooLarge
            if not message.get("more_body"):
                return _first({"type": "http.request", "body": b"".join(parts), "more_body": False}, receive)


def _first(message: Message, receive: Receive) -> Receive:
    waiting = [message]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay

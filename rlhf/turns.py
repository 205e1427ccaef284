"""A lock that serves in the order of asking. `threading.Lock` does not: under load, one waiter may starve."""

from __future__ import annotations

from collections import deque
from threading import Event, Lock


class Turns:
    """Held by one thread at a time, the one that has waited longest next."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._waiting: deque[Event] = deque()
        self._held = False

    def acquire(self, timeout: float) -> bool:
        """Wait for the turn; False where it has not come after `timeout` seconds."""
        with self._guard:
            if not self._held:
                self._held = True
                return True
            mine = Event()
            self._waiting.append(mine)
        if mine.wait(timeout):
            return True
        with self._guard:
            if mine.is_set():  # it came just now
                return True
            self._waiting.remove(mine)
            return False

    def release(self) -> None:
        """Give the turn to the next."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False

"""Time that a test moves."""

from __future__ import annotations


class Clock:
    """Unix time, standing still until `now` is set."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

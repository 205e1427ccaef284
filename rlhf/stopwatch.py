"""Seconds of the parts of a step, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Stopwatch:
    """What `lap` has counted, in seconds by part. A GPU is waited for, or its work would count to what comes next."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._since = clock()

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or since the watch was made, to `part`."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = self._clock()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

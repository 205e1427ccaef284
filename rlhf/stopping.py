"""Stopping cleanly: SIGTERM, or Ctrl-C once, lets the step under way finish; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = 0.05
"""Seconds after which a Ctrl-C that was lost comes once more."""
NOTED = b"\nstopping after this step; once more to stop at once, without saving\n"


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop and has saved its work; the message says how to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.status = 128 + signum
        """Of the process, as shells count: 143 after SIGTERM, 130 after Ctrl-C."""


class StopRequest:
    """Whether somebody asked to stop, and by which signal."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def heed(self, message: str) -> None:
        """Raise Stopped if somebody asked."""
        if self.signum is not None:
            raise Stopped(message, self.signum)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Take note of signals instead of dying of them: `with stop_request() as stop: ... if stop: save, raise Stopped`.

    A request that came when there was no next step to look at it raises Stopped at the end of the block: whoever called
    must not go on either. A signal that the process ignores stays ignored, and outside the main thread, where Python
    handles no signals, nothing is noted.
    """
    request = StopRequest()
    before = {} if threading.current_thread() is not threading.main_thread() else _handlers()

    def note(signum: int, _: object) -> None:
        request.signum = signum
        _restore(before)  # the second one is not held back
        os.write(2, NOTED)  # print is not reentrant

    for signum in before:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        _restore(before)
    request.heed("what was under way is finished: run it again to go on")


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Inside the block Ctrl-C ends the process even if it falls into a callback of the garbage collector.

    Python cannot raise anything from there: it would print the KeyboardInterrupt and go on as if nothing had been.
    """
    before = sys.unraisablehook
    coming: list[threading.Timer] = []

    def hook(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)
            return
        coming.append(threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT)))
        coming[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for again in coming:  # too late: there is nothing left to end
            again.cancel()


def _handlers() -> dict[int, object]:
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    return {signum: handler for signum, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


def _restore(handlers: dict[int, object]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)  # type: ignore[arg-type]

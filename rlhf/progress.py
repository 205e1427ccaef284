"""Progress that a person can follow: a bar on a terminal, a plain line now and then anywhere else.

Everything goes to standard error, so that standard output holds results only, and only the first process prints.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LINE_EVERY_SECONDS = 10.0
LINE_EVERY_SHARE = 0.1
LINE_AT_LEAST_SECONDS = 2.0  # a stage that is over in a moment needs no ten lines

_QUIET_ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # bars of other libraries: ours are below
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns at every fork otherwise
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # several processes: advice on DDP's settings, host names that do not resolve
}


OnProgress = Callable[[int], None]
"""Is told how many more are done."""


def ignore(_: int) -> None:
    """Nobody watches."""


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes (rank 0, or the only one)."""
    return int(os.environ.get("RANK") or 0) == 0


def quiet() -> None:
    """Silence the harmless noise of third-party libraries. Call it before importing them; what the user set stays."""
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning):
        for library in ("transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub", "torch", "gradio"):
            warnings.filterwarnings("ignore", category=category, module=rf"{library}(\.|$)")


def duration(seconds: float) -> str:
    """`0:07`, `12:30` or `1:02:03`."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """How far one stage is. Made by `progress`."""

    def __init__(self, name: str, total: int | None, done: int) -> None:
        self.name = name
        self.total = total
        self.done = done
        self.numbers: dict[str, float] = {}
        self._done_at_start = done
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was opened."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds left at the mean pace so far; None before the first step and where the total is unknown."""
        steps = self.done - self._done_at_start
        if self.total is None or steps <= 0:
            return None
        return self.elapsed / steps * max(self.total - self.done, 0)

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Count `steps` more, and show `numbers` (score=0.31) from now on."""
        self.done += steps
        self.numbers.update({name: float(value) for name, value in numbers.items()})
        self._show()

    def describe_numbers(self) -> str:
        """`score 0.31  kl 2.1`."""
        return "  ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())

    def _show(self) -> None:
        """Other ranks show nothing."""

    def _close(self, *, finished: bool) -> None:
        """Other ranks show nothing."""


class _LineBar(Bar):
    """Plain lines, at a pace that suits a log file. Within another bar, only what takes long is told."""

    depth = 0

    def __init__(self, name: str, total: int | None, done: int) -> None:
        super().__init__(name, total, done)
        self._nested = _LineBar.depth > 0
        _LineBar.depth += 1
        self._printed_at, self._printed_done = time.monotonic(), done
        if not self._nested:
            self._print()

    def _print(self) -> None:
        self._printed_at, self._printed_done = time.monotonic(), self.done
        count = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        parts = [f"{self.name} {count}"]
        if self.done > self._done_at_start:
            parts.append(f"elapsed {duration(self.elapsed)}")
        if self.remaining is not None and self.done != self.total:
            parts.append(f"left {duration(self.remaining)}")
        print("  ".join([*parts, self.describe_numbers()]).rstrip(), file=sys.stderr, flush=True)

    def _show(self) -> None:
        waited = time.monotonic() - self._printed_at
        share = (self.done - self._printed_done) / self.total if self.total else 0.0
        soon = share >= LINE_EVERY_SHARE and waited >= LINE_AT_LEAST_SECONDS
        if waited >= LINE_EVERY_SECONDS or (not self._nested and (soon or self.done == self.total)):
            self._print()

    def _close(self, *, finished: bool) -> None:
        _LineBar.depth -= 1
        if finished and not self._nested and self._printed_done != self.done:
            self._print()


class _Terminal:
    """The one live display of this process; nested bars are rows of it."""

    def __init__(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        self.console = Console(stderr=True)
        self.open_bars = 0
        self.live = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(bar_width=24),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("{task.fields[left]}", markup=False),
            rich.TextColumn("{task.fields[numbers]}", markup=False),
            console=self.console,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe must not end on the screen
        )


_terminal: _Terminal | None = None


class _TerminalBar(Bar):
    """A row of the live display."""

    def __init__(self, name: str, total: int | None, done: int) -> None:
        global _terminal
        super().__init__(name, total, done)
        _terminal = _terminal or _Terminal()
        self._terminal = _terminal
        if self._terminal.open_bars == 0:
            self._terminal.live.start()
        self._terminal.open_bars += 1
        self._task: Any = self._terminal.live.add_task(name, total=total, completed=done, left="", numbers="")

    def _show(self) -> None:
        left = f"left {duration(self.remaining)}" if self.remaining else ""
        self._terminal.live.update(self._task, completed=self.done, left=left, numbers=self.describe_numbers())

    def _close(self, *, finished: bool) -> None:
        global _terminal
        self._terminal.live.stop_task(self._task)
        self._terminal.open_bars -= 1
        if self._terminal.open_bars == 0:
            self._terminal.live.stop()
            _terminal = None
        else:
            self._terminal.live.remove_task(self._task)  # or forty rollouts would leave forty rows


@contextmanager
def progress(name: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
    """Show how far a stage is: `with progress("ppo", total=40) as bar: bar.advance(1, score=0.31, kl=2.1)`.

    `done` is what an earlier, interrupted run has already done. May be nested.
    """
    kind = Bar if not is_main_process() else _TerminalBar if _on_terminal() else _LineBar
    bar = kind(name, total, done)
    try:
        yield bar
    except BaseException:
        bar._close(finished=False)
        raise
    bar._close(finished=True)


def say(text: str) -> None:
    """Print a line, above the bars where there are any. First process only."""
    if not is_main_process():
        return
    if _terminal is not None:
        _terminal.console.print(text, markup=False, highlight=False)
    else:
        print(text, file=sys.stderr, flush=True)


def _on_terminal() -> bool:
    # FORCE_COLOR makes rich believe in a terminal where a log is written, so ask the stream itself
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

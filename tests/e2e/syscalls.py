"""What strace saw of a process that saves: whether it waited for the disk between a write to the log and the answer."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CALLS = "write,writev,pwrite64,pwritev,sendto,sendmsg,fsync,fdatasync,sync_file_range"
LINE = re.compile(r"(?P<pid>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<call>\w+)\()(?P<rest>.*)")
WAITS = ("fsync", "fdatasync")
ATTACH_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """What happened between the answer before and this one."""

    writes: int
    """To the write-ahead log."""
    waited: bool
    """Whether the disk said that it has all of them before the answer began to be sent."""


def answers(lines: Iterable[str], log: str, sign: str) -> Iterator[Answer]:
    """The answers in a trace: calls whose data hold `sign`. `log` is how the log's path ends.

    A wait counts from where it returned 0, an answer from where its call began.
    """
    writes, waited, waiting = 0, False, set()
    for match in filter(None, map(LINE.match, lines)):
        pid, call, rest = match["pid"], match["call"] or match["resumed"], match["rest"]
        begins, ends = match["call"] is not None, "<unfinished ...>" not in rest
        if call in WAITS:
            if begins and _on(rest, log):
                waiting.add(pid)
            if ends and pid in waiting:
                waiting.discard(pid)
                waited = waited or rest.rstrip().endswith("= 0")
        elif begins and _on(rest, log):
            writes, waited = writes + 1, False
            waiting.clear()  # a wait that began before says nothing about this write
        elif begins and sign in rest:
            yield Answer(writes, waited)
            writes, waited = 0, False


def _on(rest: str, log: str) -> bool:
    """Whether a call's first argument, a descriptor with its path, is the log's."""
    return re.match(r"\d+<[^>]*" + re.escape(log) + ">", rest) is not None


def command(output: Path) -> list[str]:
    """strace with what `answers` needs to know, its words into a file."""
    return ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(output)]


def traced(program: Sequence[str], output: Path) -> list[str]:
    """Run a program under strace; returns the trace. Raises CalledProcessError."""
    subprocess.run([*command(output), *program], check=True, capture_output=True, timeout=300)
    return output.read_text().splitlines()


@contextmanager
def watching(pid: int, output: Path) -> Iterator[None]:
    """strace a process that runs already, with all its threads, until the end of the block."""
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    watcher = subprocess.Popen([*command(output), "-p", str(pid)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + ATTACH_SECONDS
        while _attached(pid) < threads:
            if watcher.poll() is not None or time.monotonic() > end:
                raise RuntimeError("strace could not attach")
            time.sleep(0.05)
        yield
    finally:
        watcher.terminate()
        watcher.wait(30)


def _attached(pid: int) -> int:
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum("TracerPid:\t0" not in status for status in statuses)

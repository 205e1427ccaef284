"""A labeling page in a process of its own, over a new store, with people who have accounts there."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.labeling_client import HOST, ORIGIN, RequestFailed, Visitor
from labeling_ui.auth import Accounts
from rlhf.store import Store
from rlhf.types import Completion

WORDS = [
    f"{first}{last}" for first in ("be", "con", "de", "pre", "re") for last in ("form", "fer", "sist", "tain", "vert")
]
PASSWORD = "correct horse {} staple"
START_SECONDS = 120.0


@dataclass(frozen=True)
class Page:
    """A server that runs; `process` is `rlhf label` itself."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def cpu_seconds(self) -> float:
        """Processor time that the server has used so far, in all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it as Ctrl-C would not: there is nothing to wait for."""
        self.process.kill()
        self.process.wait()


def fill(store: Store, items: int, *, words: int = 100, completions: int = 4, seed: int = 0) -> None:
    """Store this many items of completions of about so many words."""
    chance = random.Random(seed)
    for number in range(items):
        texts = [" ".join(chance.choices(WORDS, k=round(words * chance.uniform(0.8, 1.2)))) for _ in range(completions)]
        prompt = f"Question {number}: what {' '.join(chance.choices(WORDS, k=15))}?"
        store.add_completions(prompt, [Completion(text, "load", place) for place, text in enumerate(texts)])


def invitations(store: Store, names: Sequence[str]) -> list[str]:
    """One for each name, after an admin has an account; without one the page does not open."""
    accounts = Accounts(store)
    if not accounts.has_admin():
        accounts.join(accounts.invite("admin", "boss"), "boss", PASSWORD.format("boss"))
    return [accounts.invite("annotator", name) for name in names]


@contextmanager
def serving(store: str, folder: Path, *flags: str) -> Iterator[Page]:
    """`rlhf label` on a free port of this machine, as behind a proxy that speaks TLS; killed at the end."""
    page = start(store, folder, free_port(), *flags)
    try:
        yield page
    finally:
        page.stop()


def start(store: str, folder: Path, port: int, *flags: str) -> Page:
    """Start the page and wait until it answers. Raises RuntimeError where it does not."""
    command = [sys.executable, "-m", "rlhf", "label", "--store", store, "--accounts", "true", "--public_url", ORIGIN]
    command += ["--port", str(port), "--output", str(folder / "label"), "--tracking.wandb", "off", *flags]
    log = folder / "server.log"
    with log.open("ab") as file:
        page = Page(subprocess.Popen(command, stdout=file, stderr=file), port, log)
    end = time.monotonic() + START_SECONDS
    while not _healthy(port):
        if page.process.poll() is not None or time.monotonic() > end:
            page.stop()
            raise RuntimeError(f"the page did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
    return page


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(port: int) -> bool:
    try:
        with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as line:
            line.sendall(f"GET /healthz HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode())
            return line.recv(64).startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))
    except OSError:
        return False


async def enter(port: int, names: Sequence[str], tokens: Sequence[str]) -> list[Visitor]:
    """Everybody joins by invitation, logs in again and opens the page. Raises RequestFailed."""

    async def one(number: int, name: str, token: str) -> Visitor:
        visitor = Visitor(port, number)
        await visitor.join(token, PASSWORD.format(name))
        await visitor.login(name, PASSWORD.format(name))
        await visitor.open_page()
        return visitor

    people = [one(number, name, token) for number, (name, token) in enumerate(zip(names, tokens, strict=True))]
    found = await asyncio.gather(*people, return_exceptions=True)
    failed = [each for each in found if isinstance(each, BaseException)]
    if failed:
        raise RequestFailed(f"{len(failed)} people could not enter: {failed[0]}", answered=True) from failed[0]
    return [each for each in found if isinstance(each, Visitor)]

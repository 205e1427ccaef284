"""Accounts in a real browser, against the command as people start it: invite, join, work, leave, come back."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.store import Store
from rlhf.types import Completion

PASSWORD = "correct horse battery"


class Command:
    """`rlhf label --accounts` in a process of its own, to be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "labels.db"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._where = ("--store", str(self.store), "--port", str(self.port))
        self._output = str(folder / "label")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "rlhf", "label", "--accounts", *self._where, "--output", self._output]
        self._process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                assert self._process.poll() is None, "the command ended by itself"
                time.sleep(0.2)
        raise AssertionError("the page did not open")

    def end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=120)
            self._process = None

    def invite(self, *options: str) -> str:
        command = [sys.executable, "-m", "rlhf", "accounts", "invite", *options, *self._where]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    store = Store(command.store)
    for prompt in ("first", "second"):
        store.add_completions(prompt, [Completion(text, "m", 0) for text in ("one", "two", "three")])
    store.close()
    yield command
    command.end()


@pytest.mark.timeout(900)
def test_invite_join_rank_leave_return_and_survive_a_restart(command: Command, browser: Any) -> None:
    admin_link, link = command.invite("--role", "admin", "--name", "root"), command.invite()
    command.start()
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(120_000)

    page.goto(command.url)
    page.wait_for_url("**/login")
    page.goto(link)
    join(page, "anna")
    page.wait_for_selector("body[data-screen=rank] .rows .rank-row")
    assert page.get_by_role("navigation", name="Account").locator("b").inner_text() == "anna"
    for letter in "ABC":
        page.keyboard.press(letter)
        page.keyboard.press("1")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("document.body.textContent.includes('Saved ')")
    assert ranked_by(command) == ["anna"]

    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    assert context.cookies() == []
    page.go_back()
    page.wait_for_url("**/login")  # nothing of the page was kept by the browser
    log_in(page, "anna", "not my password")
    page.wait_for_selector("[role=alert]")
    log_in(page, "anna", PASSWORD)
    page.wait_for_selector("body[data-screen=rank] .rows .rank-row")

    command.end()
    command.start()
    page.reload()
    page.wait_for_selector("body[data-screen=rank] .rows .rank-row")

    page.goto(f"{command.url}/admin/")
    assert "This is for admins." in page.locator("main").inner_text()
    used = browser.new_context().new_page()
    used.goto(link)
    assert "unknown, used up or expired" in used.locator("main").inner_text()
    used.goto(admin_link)
    join(used, None)
    used.goto(f"{command.url}/admin/")
    used.get_by_role("link", name="Ranking").wait_for()
    assert re.match(r".*/admin/$", used.url)


def join(page: Any, name: str | None) -> None:
    if name is not None:
        page.get_by_label("Name").fill(name)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("Password again").fill(PASSWORD)
    page.get_by_role("button", name="Join").click()
    page.wait_for_url(re.compile(r"/$"))


def log_in(page: Any, name: str, password: str) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password", exact=True).fill(password)
    page.get_by_role("button", name="Log in").click()


def ranked_by(command: Command) -> list[str]:
    store = Store(command.store)
    try:
        return [ranking.annotator for ranking in store.rankings()]
    finally:
        store.close()

"""Where Chromium is missing, tests that need it are left out; under CI they run all the same, and fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.page_world import Site, Visit, opened, running

CHROMIUM = Path("/usr/bin/chromium")
QUIET_CHROMIUM = [
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CHROMIUM.is_file() or os.environ.get("CI") == "true":
        return
    need_it = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=need_it)
    items[:] = [item for item in items if item not in need_it]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET_CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """`site(items, ...)` serves a ranking page until the test ends."""
    with ExitStack() as stack:
        yield lambda *items, **options: stack.enter_context(running(tmp_path, items, **options))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """`visit(site, ...)` opens it in a browser of its own and waits until there is something to rank."""
    visits: list[Visit] = []

    def start(where: Site, width: int = 1280, height: int = 900, screen: str = "rank", **options: Any) -> Visit:
        visits.append(opened(browser, where.url, width, height, **options))
        return visits[-1].ready(screen)

    yield start
    for each in visits:
        each.page.context.close()

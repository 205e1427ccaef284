"""Where Chromium is missing, tests that need it are left out; under CI they run all the same, and fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
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


@pytest.fixture(autouse=True)
def _no_page_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A page of a server that is gone asks for it without end."""
    yield
    if "browser" in request.fixturenames:
        for context in request.getfixturevalue("browser").contexts:
            context.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Adds to the report of a test that failed what its pages showed, complained of and asked for."""
    report = yield
    browser = getattr(item, "funcargs", {}).get("browser")
    if call.when == "call" and report.failed and browser is not None:
        pages = [page for context in browser.contexts for page in context.pages]
        report.sections.append(("pages", "\n\n".join(map(_shown, pages))))
    return report


def _shown(page: Any) -> str:
    try:
        return _seen(page)
    except Exception as error:  # a page may have crashed; the test's own failure is what counts
        return f"a page that cannot be looked at: {error}"


def _seen(page: Any) -> str:
    lines = [page.url, " ".join(page.locator("body").inner_text(timeout=5000).split())[:1000]]
    lines += [f"{message.type}: {message.text}" for message in page.console_messages()]
    lines += [f"error: {error}" for error in page.page_errors()]
    lines += [f"{request.method} {request.url} {_outcome(request)}" for request in page.requests()]
    return "\n".join(lines)


def _outcome(request: Any) -> str:
    """An answer's status, what went wrong, or that nothing came."""
    answer = request.existing_response
    return str(answer.status) if answer else request.failure or "without an answer"


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

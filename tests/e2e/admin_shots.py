"""Pictures of every tab of the admin page, wide and narrow: `python -m tests.e2e.admin_shots OUT`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.e2e.admin_world import PASSWORD, World, running
from tests.e2e.conftest import CHROMIUM, QUIET_CHROMIUM

SIZES = {"1280": {"width": 1280, "height": 860}, "390": {"width": 390, "height": 844}}
TALLEST = 1700
"""Pixels; the lists below go on."""
TABS = ("Queue", "Agreement", "Annotators", "Disputes", "Data")


def main(out: Path) -> None:
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder, running(Path(folder)) as world:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET_CHROMIUM)
        for name, size in SIZES.items():
            for scheme in ("light", "dark"):
                _walk(browser, world, out, f"{name}-{scheme}", size, scheme)
        browser.close()


def _walk(browser: Any, world: World, out: Path, name: str, size: Any, scheme: Any) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(60_000)
    enter(page, world.url, "root")
    page.goto(f"{world.url}admin/")
    page.locator("#queue-board .tiles").wait_for()
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.locator(f"#{tab.lower()}-board :is(table, .tiles, .downloads)").first.wait_for()
        if tab == "Disputes":
            page.get_by_role("button", name="Open the most doubtful one").click()
            page.locator("#case-cards article").first.wait_for()
            page.get_by_role("button", name="Show what the annotators said").click()
            page.locator("#statements table").wait_for()
        page.wait_for_timeout(500)
        path = out / f"admin-{tab.lower()}-{name}.png"
        page.screenshot(path=path, full_page=True)
        _shrink(path)
    context.close()


def _shrink(path: Path) -> None:
    """The upper part, in few colours."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    picture.crop((0, 0, picture.width, min(picture.height, TALLEST))).quantize(64).save(path, optimize=True)


def enter(page: Any, url: str, name: str) -> None:
    """Log in by the form."""
    page.goto(f"{url}login")
    page.locator("input[name=name]").fill(name)
    page.locator("input[name=password]").fill(PASSWORD)
    page.locator("button[type=submit]").first.click()
    page.wait_for_url(lambda here: "/login" not in here)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

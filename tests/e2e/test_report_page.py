"""The report in a real browser: pages and filters, hostile text, no request, two widths, and paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import EvaluateConfig, PPOConfig, Tracking
from rlhf.report import Fact, Line, Plot, ReportData, Table, render, write_report_data
from rlhf.tracking import Tracker

OFF = Tracking(wandb="off")
HOSTILE = '</div><script>window.pwned=1</script><img src=http://evil.example/x onerror="window.pwned=2">\'"&<b>bold'
COLUMNS = ("prompt", "baseline", "policy", "winner", "baseline score", "policy score")
LONG = "a table with a very long note indeed " * 3
WORDS = "www." + "unbreakable" * 30


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages with twelve samples, the last of them hostile."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    with Tracker(run / "ppo", stage="ppo", config=PPOConfig(prompts=HOSTILE), tracking=OFF) as tracker:
        for step in range(1, 9):
            values = ("objective/scores", "objective/kl", "gen/length_mean", "objective/entropy", "val/var_explained")
            tracker.log({name: step / (i + 2) for i, name in enumerate(values)}, step=step)
    rows: list[tuple[Any, ...]] = [
        (f"prompt {i}", f"before {i}", f"after {i}", "policy" if i % 3 else "baseline", float(-i), float(i))
        for i in range(11)
    ]
    rows.append((HOSTILE, HOSTILE, WORDS, "policy", 0.5, None))
    with Tracker(run / "evaluate", stage="evaluate", config=EvaluateConfig(), tracking=OFF) as tracker:
        tracker.table("samples", COLUMNS, rows, step=0)
    data = ReportData(
        "Evaluation",
        "The policy wins.",
        (Fact("Win rate", 0.7, 0.6, 0.8, LONG, 0.5),),
        plots=(Plot("Frontier", "KL, nats", "score", (Line("a", (0.0, 1.0), (0.0, 1.0), ("here", "there")),)),),
        tables=(Table("Wide", ("", *COLUMNS), (("score", *["0.123 (0.012 to 0.345)"] * 6),), LONG),),
    )
    write_report_data(run / "evaluate", data)
    return render(run)


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report, open; fails afterwards where a request left or a script complained."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    asked: list[str] = []
    problems: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.goto(report.as_uri())
    yield opened
    assert asked == [report.as_uri()]
    assert problems == []
    context.close()


def shown(page: Any) -> list[str]:
    return page.locator(".sample:visible .prompt").all_inner_texts()


def test_pages_filters_and_orders(page: Any) -> None:
    where = page.locator(".tools [role=status]")
    assert shown(page) == [f"prompt {i}" for i in range(5)]
    assert where.inner_text() == "1 to 5 of 12"
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Next").click()
    assert shown(page)[0] == "prompt 10"
    assert where.inner_text() == "11 to 12 of 12"
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_label("winner").select_option("baseline")
    assert shown(page) == [f"prompt {i}" for i in (0, 3, 6, 9)]
    page.get_by_label("Order").select_option(label="policy score, highest first")
    assert shown(page) == [f"prompt {i}" for i in (9, 6, 3, 0)]
    page.get_by_label("Show samples that contain").fill("AFTER 6")
    assert shown(page) == ["prompt 6"]
    page.get_by_label("Show samples that contain").fill("winner")  # a label of every card, and no sample's text
    assert where.inner_text() == "none"


def test_hostile_text_is_only_text(page: Any) -> None:
    page.get_by_label("Show samples that contain").fill("evil.example")
    assert shown(page) == [HOSTILE]
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, .sample b, .sample script").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_plots_can_be_read(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    card, words = page.evaluate(
        "[getComputedStyle(document.querySelector('figure')).backgroundColor,"
        " getComputedStyle(document.querySelector('svg text')).fill]"
    )
    assert contrast(card, words) >= 4.5  # what WCAG asks of small text


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [int(each) / 255 for each in colour[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_on_paper_everything_is_unfolded(page: Any) -> None:
    assert page.locator("details[open]").count() == 0
    assert page.pdf()[:5] == b"%PDF-"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".tools").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(11, 11, 11)"  # dark on white

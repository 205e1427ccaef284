"""The report page: what it says, that it needs nothing else, and that hostile text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import PPOConfig, SampleConfig, SFTConfig, Tracking
from rlhf.figures import aligned, chart, interval, short, ticks
from rlhf.report import Curve, Fact, Line, Plot, ReportData, Samples, Table, render, write_report_data
from rlhf.report_data import read_report_data
from rlhf.tracking import Tracker
from rlhf.types import DataError

OFF = Tracking(wandb="off")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{7*7}}\x00\x1b[31m"

FULL = ReportData(
    title="",
    verdict="PPO beats SFT on 0.71 of comparisons (95 % interval 0.66 to 0.76).",
    facts=(Fact("Win rate", 0.71, 0.662, 0.76, note="ties as half", reference=0.5), Fact("Length", 29.0)),
    curves=(Curve("Score", ("objective/scores",)), Curve("Over episodes", ("objective/kl",), x="episode")),
    plots=(
        Plot("Frontier", "KL", "score", (Line("best-of-n", (0.0, 0.64), (0.0, 0.8), ("n=1", "n=4"), joined=False),)),
    ),
    tables=(Table("Agreement", ("annotator", "agreement"), (("a1", 0.7), ("a2", 0.75))),),
    samples=Samples(
        ("prompt", "sft", "ppo", "gain"), (("The film", "was bad", "was good", 1.5), ("It", "ended", HOSTILE, None))
    ),
)


class Page(HTMLParser):
    """Counts tags, and keeps attributes, scripts and visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        kind = self.open[-1] if self.open else ""
        (self.scripts if kind == "script" else self.words).append(data) if kind != "style" else None

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def record_ppo(folder: Path, data: ReportData | None = None) -> None:
    config = PPOConfig(tracking=OFF)
    with Tracker(folder, stage="ppo", config=config, tracking=OFF) as run:
        for step in range(1, 6):
            metrics = {"objective/scores": step / 10, "objective/kl": step * 1.0, "episode": step * 8}
            run.log(metrics | {"timing/step": 2.0, "gen/length_mean": math.nan if step == 3 else 20.0}, step=step)
        run.alert("kl", "above the budget")
        run.table("samples", ["prompt", "completion"], [["Hello", HOSTILE]], step=5)
    if data:
        write_report_data(folder, data)


def test_data_survives_its_file(tmp_path: Path) -> None:
    write_report_data(tmp_path, FULL)
    assert read_report_data(tmp_path) == FULL


def test_data_with_nan_and_from_another_version_can_be_read(tmp_path: Path) -> None:
    write_report_data(tmp_path, ReportData("t", facts=(Fact("x", math.nan, math.inf, 1.0),)))
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["facts"][0]["value"] is None
    record["facts"][0]["colour"] = "red"
    record["future"] = [1]
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert read_report_data(tmp_path) == ReportData("t", facts=(Fact("x", None, None, 1.0),))


def test_stage_page_says_all_that_the_stage_left(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "ppo"
    record_ppo(folder, FULL)
    path = render(folder)
    assert path == folder.resolve() / "report.html"
    text = read(path).text
    assert FULL.verdict in text
    assert "0.710 (0.662 to 0.760)" in text
    for words in ("ties as half", "Frontier", "n=4", "Over episodes", "a2 0.75", "above the budget", "kl_coef: 0.05"):
        assert words in text, words
    assert text.index(FULL.verdict) < text.index("Frontier") < text.index("Settings") < text.index("Environment")


def test_stage_without_report_data_shows_the_known_curves(tmp_path: Path) -> None:
    record_ppo(tmp_path / "ppo")
    text = read(render(tmp_path / "ppo")).text
    for words in ("Score against KL", "KL to the baseline", "objective/scores", "0.1 → 0.5", "Hello"):
        assert words in text, words
    assert "timing/step" not in text.partition("Settings")[0]


def test_run_page_starts_with_the_verdict_and_tells_every_stage(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    record_ppo(run / "ppo")
    with Tracker(run / "sample", stage="sample", config=SampleConfig(), tracking=OFF) as sample:
        sample.summary({"completions": 1024})
    with Tracker(run / "evaluate", stage="evaluate", config=PPOConfig(), tracking=OFF):
        pass
    write_report_data(run / "evaluate", FULL)
    (run / "not_a_stage").mkdir()
    path = render(run)
    text = read(path).text
    order = [FULL.verdict, "What was done", "Before and after", "Score against KL", "completions 1024", "Settings"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "seed 0" in text
    assert "as it is: there were no demonstrations" in text
    assert "was fine-tuned on demonstrations" not in text
    with Tracker(run / "sft", stage="sft", config=SFTConfig(), tracking=OFF):
        pass
    assert "was fine-tuned on demonstrations; that is the baseline" in read(render(run)).text
    assert (run / "ppo" / "report.html").is_file()
    assert (run / "evaluate" / "report.html").is_file()


def test_run_page_before_the_evaluation(tmp_path: Path) -> None:
    record_ppo(tmp_path / "demo" / "ppo")
    assert "has not been evaluated yet" in read(render(tmp_path / "demo")).text


def test_page_loads_nothing_and_runs_one_script(tmp_path: Path) -> None:
    record_ppo(tmp_path / "ppo", FULL)
    page = read(render(tmp_path / "ppo"))
    assert page.open == []  # every tag is closed, in order
    assert len(page.scripts) == 1
    assert not {"img", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, names in page.tags for name in names if name.startswith("on") or name in ("src", "href")]
    policy = next(names["content"] for _, names in page.tags if names.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_text_is_shown_as_text_everywhere(tmp_path: Path) -> None:
    hostile = ReportData(
        HOSTILE,
        HOSTILE,
        (Fact(HOSTILE, HOSTILE, note=HOSTILE),),
        (Curve(HOSTILE, ("objective/scores",), note=HOSTILE),),
        (Plot(HOSTILE, HOSTILE, HOSTILE, (Line(HOSTILE, (1.0,), (2.0,), (HOSTILE,)), Line(HOSTILE, (1.0,), (2.0,)))),),
        (Table(HOSTILE, (HOSTILE,), ((HOSTILE,),), HOSTILE),),
        Samples((HOSTILE, "prompt"), ((HOSTILE, HOSTILE),)),
    )
    record_ppo(tmp_path / "ppo", hostile)
    page = read(render(tmp_path / "ppo"))
    assert len(page.scripts) == 1
    assert "img" not in {tag for tag, _ in page.tags}
    assert not [name for _, names in page.tags for name in names if name.startswith("on")]
    assert page.text.count("<img src=x onerror=alert(2)>") >= 15
    assert "\x00" not in page.text
    assert "\x1b" not in page.text


def test_passwords_do_not_reach_the_page(tmp_path: Path) -> None:
    config = SampleConfig(store="postgresql://ann:s3cret@db/labels")
    with Tracker(tmp_path / "sample", stage="sample", config=config, tracking=OFF):
        pass
    source = render(tmp_path / "sample").read_text(encoding="utf-8")
    assert "s3cret" not in source
    assert "postgresql://ann:***@db/labels" in source


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_nothing_to_report_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{name} holds no run"):
        render(tmp_path / name)


def test_half_characters_do_not_stop_the_report(tmp_path: Path) -> None:
    record_ppo(tmp_path / "ppo", ReportData("t", samples=Samples(("prompt",), (("half \ud800",),))))
    assert "half ?" in read(render(tmp_path / "ppo")).text


def test_torn_and_missing_files_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "ppo"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "objective/scores": 0.5}\n{"step": 2, "objec')
    (folder / "report.json").write_text("{")
    assert "Score" in read(render(folder)).text


def test_chart_draws_every_point_where_it_belongs() -> None:
    xs, ys = (0.0, 1.0, 2.0, 3.0), (5.0, 7.0, None, 6.0)
    drawing = chart("t", "step", [Line("a", xs, ys)])
    (path,) = re.findall(r' d="([^"]*)"', drawing)
    moves = re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    assert [kind for kind, _, _ in moves] == ["M", "L", "M"]  # the gap lifts the pen
    (x0, y0), (x1, y1), (x3, y3) = [(float(x), float(y)) for _, x, y in moves]
    assert (x3 - x0) / (x1 - x0) == pytest.approx(3.0, abs=0.01)  # equal steps, equal widths
    assert (y0 - y3) / (y0 - y1) == pytest.approx(0.5, abs=0.01)  # 6 lies half way from 5 to 7, upwards
    assert y1 < y0
    assert "5 → 6" in drawing


def test_chart_of_nothing_is_nothing() -> None:
    assert chart("t", "step", [Line("a", (1.0,), (None,)), Line("b", (), ())]) == ""


@pytest.mark.parametrize("values", [(3.0,), (2.0, 2.0), (0.0, 0.0), (-5.0, -5.0), (1e9, 1e9 + 1), (1e-9, 2e-9)])
def test_chart_of_flat_and_extreme_lines(values: tuple[float, ...]) -> None:
    drawing = chart("t", "step", [Line("a", tuple(map(float, range(len(values)))), values)])
    assert "nan" not in drawing
    assert "inf" not in drawing


def test_long_lines_are_thinned_to_their_ends() -> None:
    drawing = chart("t", "step", [Line("a", tuple(range(10_001)), tuple(float(x) for x in range(10_001)))])
    assert drawing.count("<circle") <= 302
    assert "10,000, 10,000" in drawing


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    high = low + width
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)
    steps = {round(b - a, 12) for a, b in pairwise(found)}
    for step in steps:
        mantissa = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - round_number) for round_number in (1, 2, 5, 10)) < 1e-3 * mantissa


def test_interval_marks_lie_in_order() -> None:
    drawing = interval(Fact("w", 0.71, 0.66, 0.76, reference=0.5))
    reference = float(re.search(r'class="reference" x1="([\d.]+)"', drawing).group(1))  # pyright: ignore
    value = float(re.search(r'cx="([\d.]+)"', drawing).group(1))  # pyright: ignore
    assert reference == pytest.approx(80.0)  # the middle of a scale from 0 to 1
    assert (value - reference) / 152 == pytest.approx(0.21, abs=1e-3)
    assert interval(Fact("w", 0.71, 0.66, 0.76)) == ""
    assert interval(Fact("w", 0.71, reference=0.5)) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.6131, "0.613"), (12000.4, "12,000"), (3.14e-5, "3.1e-05"), (-0.25, "-0.25"), (999.6, "1e+03")],
)
def test_short(value: float, words: str) -> None:
    assert short(value) == words


def test_columns_share_their_decimals() -> None:
    assert aligned([0.7, 0.72, 12.5]) == ["0.70", "0.72", "12.50"]


def test_rendering_imports_nothing_heavy(tmp_path: Path) -> None:
    record_ppo(tmp_path / "ppo", FULL)
    code = (
        "import sys; from pathlib import Path; from rlhf import report\n"
        f"report.render(Path({str(tmp_path / 'ppo')!r}))\n"
        "print({'torch', 'transformers', 'wandb', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""The label stage from its configuration to its files, in a process that cannot import torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from labeling_ui import stage
from rlhf.config import LabelConfig, Simulation, Tracking
from rlhf.data import read_rankings, write_rankings
from rlhf.report import render
from rlhf.run_folder import read_records
from rlhf.store import Store
from rlhf.types import Completion, ConfigError, DataError, Ranking

ROOT = Path(__file__).parents[2]
OFF = Tracking(wandb="off")


def length(prompt: str, text: str) -> float:
    """A utility for simulated annotators: long texts are better."""
    return len(text)


def make_store(path: Path, items: int = 12) -> Store:
    store = Store(path)
    for number in range(items):
        store.add_completions(
            f"p{number}", [Completion("word " * (number + place), "m", place) for place in range(1, 4)]
        )
    return store


def simulated(tmp_path: Path, **more: object) -> stage.LabelResult:
    (tmp_path / "taste_of_stage.py").write_text("def length(prompt, text): return len(text)\n")
    simulate = Simulation(utility="taste_of_stage:length")
    store, output = str(tmp_path / "labels.db"), str(tmp_path / "out")
    return stage.run(
        LabelConfig(store=store, output=output, simulate=simulate, overlap_share=1.0, tracking=OFF, **more)
    )  # pyright: ignore


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_simulated_rankings_and_their_numbers_are_written(here: Path) -> None:
    store = make_store(here / "labels.db")
    result = simulated(here)
    read = read_rankings(here / "out" / "rankings.jsonl")
    assert read.bad == []
    assert read.rankings == store.rankings()
    assert (result.rankings, result.items, len(result.annotators)) == (24, 12, 5)
    summary = json.loads((here / "out" / "label.json").read_text())
    assert summary["rankings"] == 24
    assert summary["simulated"] is True
    assert summary["path"] == "rankings.jsonl"
    assert summary["content_hash"] == store.content_hash()
    (metrics,) = read_records(here / "out" / "metrics.jsonl")
    assert metrics["agreement"] == pytest.approx(summary["agreement"]["without_ties"]["value"])
    assert metrics["step"] == 24
    report = render(here / "out").read_text()
    assert "Does the place on the page matter?" in report
    assert "simulated-5" in report
    agreed = summary["agreement"]["without_ties"]
    assert agreed["low"] <= agreed["value"] <= agreed["high"]
    assert len(summary["wins_by_place"]) == 3


def test_a_second_run_changes_nothing(here: Path) -> None:
    make_store(here / "labels.db")
    first = simulated(here)
    files = [(here / "out" / name).read_bytes() for name in ("rankings.jsonl", "label.json")]
    assert simulated(here) == first
    assert [(here / "out" / name).read_bytes() for name in ("rankings.jsonl", "label.json")] == files


def test_gold_repeats_and_marks_are_told(here: Path) -> None:
    store = make_store(here / "labels.db", items=30)
    texts = [("word " * 9, "word " * 2, "word "), ("word " * 5, "word " * 3)]
    gold = [Ranking(f"g{n}", each, tuple(range(1, len(each) + 1)), "expert") for n, each in enumerate(texts)]
    write_rankings(here / "gold.jsonl", gold)
    result = simulated(here, gold="gold.jsonl", gold_rate=0.1, repeat_rate=0.2)
    assert result.gold is not None
    assert result.gold.share is not None
    assert result.gold.share > 0.9, "longer is better, and gold says so"
    assert result.repeats is not None
    assert result.repeats.items > 0
    assert {ranking.prompt for ranking in store.rankings()} == {f"p{n}" for n in range(30)}
    assert result.rankings == 60
    assert result.marks == {}, "nobody simulated is too fast"
    summary = json.loads((here / "out" / "label.json").read_text())
    assert summary["gold"]["share"] == result.gold.share
    report = render(here / "out").read_text()
    assert "Gold items answered as known" in report
    assert "The same, when shown again" in report


def test_what_people_are_told_and_marked_for(here: Path) -> None:
    store = make_store(here / "labels.db", items=2)
    (here / "guide.md").write_text("Be fair.")
    more = {"guidelines": "guide.md", "words_per_second": 5.0, "lease_minutes": 2.0, "edit_minutes": 3.0}
    config = LabelConfig(store="labels.db", output="out", criteria=["kind"], tracking=OFF, **more)  # pyright: ignore
    service = stage._service(store, config)
    assert service.onboarding("me").guidelines == "Be fair."
    assert (service.policy.lease_seconds, service.edit_minutes, service.criteria) == (120, 3, ("kind",))
    task = service.next_task("me")
    assert task is not None
    service.submit("me", task.id, task.key, [[0], [1], [2]], flags={"ratings": {"kind": [1, 2, 3]}})
    assert stage._conclude(store, config).marks == {"too_fast": 1}
    assert "Rankings given too fast to read" in render(here / "out").read_text()


def test_nothing_to_rank_is_said(here: Path) -> None:
    with pytest.raises(DataError, match="there is no label store"):
        simulated(here)
    make_store(here / "labels.db")
    with pytest.raises(DataError, match="nothing to rank in round 3: run `rlhf sample` first"):
        simulated(here, round=3)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="overlap is 6"):
        LabelConfig(overlap=6, simulate=Simulation(utility="a:b"))
    with pytest.raises(ConfigError, match=r"repeat_rate is 0\.3"):
        LabelConfig(gold="gold.jsonl", gold_rate=0.3, repeat_rate=0.3)


def test_the_stage_runs_without_torch(
    here: Path, without_torch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    make_store(here / "labels.db")
    code = (
        "import sys; from labeling_ui import stage, app; from rlhf.config import LabelConfig, Simulation, Tracking\n"
        "off, simulation = Tracking(wandb='off'), Simulation(utility=sys.argv[3])\n"
        "stage.run(LabelConfig(store=sys.argv[1], output=sys.argv[2], simulate=simulation, tracking=off))"
    )
    utility = "tests.labeling_ui.test_stage:length"
    done = without_torch(code, str(here / "labels.db"), str(here / "out"), utility)
    assert done.returncode == 0, done.stderr
    assert (here / "out" / "label.json").is_file()


def test_the_page_is_served_until_it_is_interrupted(here: Path) -> None:
    make_store(here / "labels.db").import_rankings([])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = f"LabelConfig(store='labels.db', output='out', port={port}, tracking=Tracking(wandb='off'))"
    code = f"from labeling_ui import stage; from rlhf.config import LabelConfig, Tracking; stage.run({config})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=here, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(f"rank at http://127.0.0.1:{port} as 'me'; rankings are kept in {here / 'labels.db'}")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                    assert json.load(answer) == {"ok": True}
                break
            except OSError:
                time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 0, rest
    assert "0 rankings of 0 items" in rest
    assert json.loads((here / "out" / "label.json").read_text())["simulated"] is False

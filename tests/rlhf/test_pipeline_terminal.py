"""What a run shows while it goes on: samples as harmless lines, and a report that grows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf import pipeline
from rlhf.config import PPOConfig, Tracking
from rlhf.report_data import ReportData, write_report_data
from rlhf.tracking import Tracker

OFF = Tracking(wandb="off")


def test_a_sample_is_one_line_that_cannot_steer_the_terminal() -> None:
    line = pipeline._one_line("a\n\nfilm\x1b[2J\x07 is | " + "long " * 40, 80)
    assert line.startswith("  a film\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER} is | long")
    assert len(line) <= 80
    assert line.isprintable()


def test_a_stage_ends_with_its_sentence_and_its_last_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, stage="ppo", config=PPOConfig(), tracking=OFF) as tracker:
        for step in (1, 2):
            rows = [(f"prompt {i}", f" at {step}") for i in range(5)]
            tracker.table("samples", ("prompt", "completion"), rows, step=step)
    write_report_data(tmp_path, ReportData("PPO", "It went up."))
    pipeline._tell("ppo", tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "ppo: It went up.",
        *(f"  prompt {i} | at 2" for i in range(pipeline.SHOWN_SAMPLES)),
    ]


def test_the_report_is_written_while_a_stage_runs_and_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "REPORT_EVERY_SECONDS", 0.01)
    report, run = tmp_path / "demo" / "report.html", tmp_path / "demo"
    with pipeline._report_renewed(run), Tracker(run / "ppo", stage="ppo", config=PPOConfig(), tracking=OFF) as tracker:
        tracker.log({"objective/scores": 0.25}, step=1)
        ends = time.monotonic() + 20
        while not report.is_file() or "0.25" not in report.read_text(encoding="utf-8"):
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert "running" in report.read_text(encoding="utf-8")
    assert "finished" in report.read_text(encoding="utf-8")

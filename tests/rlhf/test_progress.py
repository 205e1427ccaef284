"""Progress: what a log file, a terminal and another rank see."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings

import pytest

from rlhf import progress as module
from rlhf.progress import duration, progress, quiet, say


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Screen(io.StringIO):
    """A standard error that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.delenv("RANK", raising=False)
    return clock


def test_plain_lines_start_and_end_a_stage(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ppo", total=100) as bar:
        for _ in range(100):
            bar.advance(1, score=0.314159, kl=2)
    assert capsys.readouterr().err.splitlines() == ["ppo 0/100", "ppo 100/100  elapsed 0:00  score 0.314  kl 2"]


def test_long_steps_print_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ppo", total=1000) as bar:
        for _ in range(30):  # 1 s a step: too small a share to count, so only time makes lines
            clock.now += 1.0
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["0/1000", "10/1000", "20/1000", "30/1000"]
    assert lines[1] == "ppo 10/1000  elapsed 0:10  left 16:30"


def test_tenths_print_but_not_in_a_rush(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reward", total=100) as bar:
        for _ in range(100):
            clock.now += 0.3  # a tenth takes 3 s
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/100" for n in range(0, 101, 10)]


def test_remaining_time_counts_from_where_the_run_resumed(clock: Clock) -> None:
    with progress("ppo", total=40, done=30) as bar:
        assert bar.remaining is None
        clock.now = 20.0
        bar.advance(2)
        assert bar.remaining == pytest.approx(80.0)  # 10 s a step, 8 steps left


def test_unknown_total_and_empty_stage(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("label") as bar:
        bar.advance(3)
    with progress("sample", total=0):
        pass
    assert capsys.readouterr().err.splitlines() == ["label 0", "label 3  elapsed 0:00", "sample 0/0"]


def test_nested_bars_tell_only_what_takes_long(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ppo", total=2) as outer:
        for seconds in (1.0, 6.0):
            with progress("generate", total=4) as inner:
                for _ in range(4):
                    clock.now += seconds
                    inner.advance(1)
            outer.advance(1)
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["ppo 0/2", "ppo 1/2", "generate 2/4", "generate 4/4", "ppo 2/2"]


def test_nothing_is_printed_on_other_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress("ppo", total=2) as bar:
        bar.advance(2, kl=1.0)
        say("hello")
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""
    assert bar.done == 2


def test_a_failure_leaves_the_bars_in_order(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="planted"), progress("ppo", total=2), progress("generate", total=2):
        raise ValueError("planted")
    with progress("ppo", total=1) as bar:
        bar.advance(1)
    assert capsys.readouterr().err.splitlines()[-2:] == ["ppo 0/1", "ppo 1/1  elapsed 0:00"]


def test_terminal_shows_bars_and_lines_above_them(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", screen)
    with progress("ppo", total=4) as outer:
        with progress("generate", total=2) as inner:
            inner.advance(2)
        say("a line with [brackets]")
        outer.advance(4, score=0.5)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "a line with [brackets]" in text
    last = text.splitlines()[-1]
    assert "ppo" in last
    assert "4/4" in last
    assert "score 0.5" in last
    assert "generate" not in last  # a finished nested bar leaves no row behind
    assert module._terminal is None


def test_say_prints_markup_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    say("[red]not markup[/red]")
    assert capsys.readouterr().err == "[red]not markup[/red]\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_quiet_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module._QUIET_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that the fixture puts back what was there
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with warnings.catch_warnings():
        quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'wandb', 'rich', 'datasets', 'matplotlib'}"
    code = f"import sys, rlhf.progress, rlhf.tracking, rlhf.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

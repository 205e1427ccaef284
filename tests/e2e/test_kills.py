"""Each stage of the tiny loop is killed once and interrupted once at a random moment, and ends the same all the same.

`python -m tests.e2e.kills` is the full form: ten times each, in processes of their own, and the whole loop too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from rlhf.config import STAGES
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def trials() -> dict[str, Any]:
    """By stage. In another process, which forks: it must have started no thread."""
    command = [sys.executable, "-m", "tests.e2e.kills", "--times", "1", "--fork", "--json", "--stages", *STAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    return {trial["stage"]: trial for trial in json.loads(done.stdout)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_broken_off_ends_as_if_it_never_had_been(trials: dict[str, Any], stage: str) -> None:
    assert trials[stage]["problems"] == []
    assert trials[stage]["kills"] == 1
    assert trials[stage]["interrupts"] == 1

"""Each item gets as many rankings as wanted, and never one more, however many work at once and however they behave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService
from rlhf.store import Store
from tests.labeling_ui.rankers import Ranker, Ticks, fill, problems, together

ROOT = Path(__file__).parents[2]


def test_sixteen_threads_with_skips_undos_edits_and_late_submits(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.db")
    fill(store, 200)
    service = LabelService(store, Policy(overlap=3, lease_seconds=60), clock=Ticks(), edit_minutes=1e6)
    people = [Ranker(service, f"a{number}", seed=1) for number in range(20)]
    together(people)
    again = [Ranker(service, person.name, seed=2, tidy=True) for person in people]
    together(again)
    assert problems(store, 3, [each for person in (*people, *again) for each in person.acknowledged]) == []
    assert len(store.rankings(late=True)) > 600, "some came too late"
    assert service.wanted() == 0


def test_two_processes_share_a_store(store_url: str) -> None:
    store = Store(store_url)
    fill(store, 60)
    names = [[f"a{number}" for number in range(first, 12, 2)] for first in (0, 1)]
    command = [sys.executable, "-m", "tests.labeling_ui.rankers", store_url, "3", "1"]
    with_output = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [subprocess.Popen([*command, *theirs], **with_output) for theirs in names]
    said = [process.communicate(timeout=280)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    acknowledged = [each for line in said for each in json.loads(line)]
    service = LabelService(store, Policy(overlap=3))
    tidy = [Ranker(service, name, seed=2, tidy=True) for theirs in names for name in theirs]
    for person in tidy:
        person.work()
    assert problems(store, 3, [*acknowledged, *(each for person in tidy for each in person.acknowledged)]) == []
    store.close()

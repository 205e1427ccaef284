"""Items per hour and the time that is left, by hand-computed numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from labeling_ui.assignment import Policy
from labeling_ui.pace import minutes_left, per_hour
from labeling_ui.service import LabelService
from rlhf.store import Store
from rlhf.types import Completion


def at(*times: float, on_page: float | None = None) -> list[tuple[float, float | None]]:
    return [(time, on_page) for time in times]


def test_items_per_hour_are_of_the_median() -> None:
    assert per_hour(at(0, 10, 20, 30, 40)) is None, "four times are too few"
    assert per_hour(at(0, 10, 20, 30, 40, 50)) == 360
    assert per_hour(at(0, 10, 20, 30, 630, 640)) == 360, "one slow item moves nothing"
    assert per_hour(at(*range(0, 500, 100), *range(500, 500 + 21 * 36, 36))) == 100, "the last 20"
    assert per_hour(at(5, 5, 5, 5, 5, 5)) is None


def test_pauses_are_cut_out() -> None:
    days = at(0, 60, 90_000, 90_060, 180_000, 180_060, 180_120, 180_180)
    assert per_hour(days) == 60
    assert per_hour(at(0, 10_000, 20_000, 30_000, 40_000, 50_000)) is None
    assert per_hour(at(0, 10_000, 20_000, 30_000, 40_000, 50_000, on_page=30)) == 120, "then the time on the page"


@pytest.mark.parametrize(
    ("held", "spaces", "others", "expected"),
    [
        (0, {}, [], 0),
        (0, {1: 60}, [], 60),  # alone, 60 items at 60 an hour
        (1, {1: 59}, [], 60),
        (0, {1: 60}, [60.0], 30),  # two share one place each
        (0, {2: 60}, [180.0], 60),  # a place for each: who is quick takes nothing away
        (0, {3: 60}, [60.0] * 9, 18),  # 180 rankings by ten
        (0, {1: 30, 2: 30}, [60.0], 30),  # 30 are safe; sharing the rest costs no time
    ],
)
def test_what_is_left_takes_so_long(held: int, spaces: dict[int, int], others: list[float], expected: float) -> None:
    assert minutes_left(60.0, held, spaces, others) == pytest.approx(expected)
    assert minutes_left(60.0, held, spaces, others, hidden_share=0.5) == pytest.approx(1.5 * expected)
    assert minutes_left(None, held, spaces, others) is None


def test_the_service_tells_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.db")
    for number in range(40):
        store.add_completions(f"p{number}", [Completion(str(i), "m", i) for i in range(2)])
    now = [1e9]
    service = LabelService(store, Policy(), clock=lambda: now[0])

    def rank(who: str) -> None:
        task = service.next_task(who)
        assert task is not None
        service.submit(who, task.id, task.key, [[0], [1]])

    for _ in range(10):
        now[0] += 30
        rank("me")
    alone = service.progress("me")
    assert (alone.ranked, alone.remaining, alone.per_hour) == (10, 30, 120)
    assert alone.minutes_left == pytest.approx(15)
    for _ in range(10):
        rank("you")
    shared = service.progress("me")
    assert shared.remaining == 20
    assert shared.minutes_left == pytest.approx(60 * 20 / (120 + 10 * 4)), "ten in the last quarter of an hour"
    now[0] += 1000
    assert service.progress("me").minutes_left == pytest.approx(10), "the others have gone"
    assert service.progress("new").minutes_left is None

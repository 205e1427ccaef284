"""Drafts, undo, edits, leases that ran out, and what is said beside the ranking."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService, Task
from rlhf.schema import drafts, rankings, users
from rlhf.store import Store
from rlhf.types import Completion, DataError
from tests.labeling_ui.clock import Clock


@pytest.fixture
def service(tmp_path: Path, clock: Clock) -> LabelService:
    """Three items of four completions, each for one annotator; leases of 60 s, edits within 10 minutes."""
    store = Store(tmp_path / "labels.db")
    for number in range(3):
        store.add_completions(f"prompt {number}", [Completion(f"some {number} text {i}", "m", i) for i in range(4)])
    more: dict[str, Any] = {"criteria": ["helpful"], "words_per_second": 2.0, "edit_minutes": 10}
    return LabelService(store, Policy(lease_seconds=60), clock=clock, **more)


def take(service: LabelService, who: str = "me") -> Task:
    task = service.next_task(who)
    assert task is not None
    return task


TIERS = [[0], [1], [2], [3]]


def submit(service: LabelService, task: Task, who: str = "me", tiers: list[list[int]] = TIERS, **more: Any) -> int:
    return service.submit(who, task.id, task.key, tiers, **more).ranking_id


def versions(service: LabelService) -> list[tuple[int, bool, list[str]]]:
    with service.store.read() as connection:
        rows = connection.execute(sa.select(rankings).order_by(rankings.c.id))
        return [(row.version, row.active, row.marks) for row in rows]


# ------------------------------------------------------------------------------------------------- drafts


def test_a_draft_comes_back_until_the_task_is_submitted(service: LabelService, clock: Clock) -> None:
    task = take(service)
    assert service.save_draft("me", task.id, {"places": [1, "pool"]}) == "1970-01-12T13:46:40+00:00"
    service.save_draft("me", task.id, {"places": [1, 2], "why": "…"})
    assert take(service).draft == {"places": [1, 2], "why": "…"}
    assert "places" not in repr(service.recent("me"))
    submit(service, task)
    with service.store.read() as connection:
        assert connection.execute(sa.select(drafts)).all() == []
    with pytest.raises(DataError, match="ranked or skipped already: no draft of it is kept"):
        service.save_draft("me", task.id, {"late": "autosave"})
    service.reopen("me", task.id)
    assert take(service).draft is None


def test_drafts_are_limited_and_ones_own(service: LabelService) -> None:
    task = take(service)
    service.save_draft("me", task.id, {"x": "y" * 16_000})
    for body, problem in (
        ({"x": "é" * 8192}, "16 ?384 are kept"),
        ({"x": float("nan")}, "cannot be kept"),
        (3, "JSON object"),
    ):
        with pytest.raises(DataError, match=problem):
            service.save_draft("me", task.id, body)  # pyright: ignore
    assert take(service).draft == {"x": "y" * 16_000}, "what was refused changed nothing"
    with pytest.raises(DataError, match="not given to 'you'"):
        service.save_draft("you", task.id, {})


def test_a_draft_renews_the_lease_and_survives_its_end(service: LabelService, clock: Clock) -> None:
    task = take(service)
    for _ in range(3):
        clock.now += 50
        service.save_draft("me", task.id, {"n": 1})
    assert task.id not in {take(service, "you").id for _ in range(1)}
    others = [take(service, who) for who in ("b",)]
    clock.now += 61
    assert take(service).draft == {"n": 1}, "nobody else took it"
    assert others


def test_a_paused_annotator_keeps_what_was_begun(service: LabelService) -> None:
    task = take(service)
    with service.store.write() as connection:
        row = {"name": "me", "role": "annotator", "paused": True, "created_at": ""}
        connection.execute(sa.insert(users).values(row))
    service.save_draft("me", task.id, {"n": 1})
    calls = (
        lambda: service.next_task("me"),
        lambda: submit(service, task),
        lambda: service.skip("me", task.id),
        lambda: service.undo("me"),
        lambda: service.reopen("me", task.id),
    )
    for call in calls:
        with pytest.raises(DataError, match="paused: what you have begun is kept"):
            call()
    with service.store.write() as connection:
        connection.execute(sa.update(users).values(paused=False))
    assert take(service).draft == {"n": 1}


# ------------------------------------------------------------------------------------------------- undo and edit


def test_an_edit_stands_beside_the_old_version_until_it_is_submitted(service: LabelService) -> None:
    task = take(service)
    submit(service, task)
    other = take(service)
    service.reopen("me", task.id)
    again = take(service)
    assert again.id == task.id
    assert again.before is not None
    assert again.before.tiers == ((0,), (1,), (2,), (3,))
    assert len(service.store.rankings()) == 1, "it stands until another is given"
    submit(service, again, tiers=[[3], [2], [1], [0]])
    assert [(version, active) for version, active, _ in versions(service)] == [(1, False), (2, True)]
    assert take(service).id == other.id


def test_an_edit_that_is_broken_off_changes_nothing(service: LabelService, clock: Clock) -> None:
    task = take(service)
    submit(service, task)
    service.reopen("me", task.id)
    service.skip("me", take(service).id)
    assert take(service).id != task.id
    service.reopen("me", task.id)
    clock.now += 61
    assert take(service).id != task.id, "its time ran out"
    assert [(version, active) for version, active, _ in versions(service)] == [(1, True)]


def test_what_is_too_old_cannot_be_changed(service: LabelService, clock: Clock) -> None:
    task = take(service)
    submit(service, task)
    clock.now += 600
    (past,) = service.recent("me")
    assert (past.editable, past.state, past.prompt_start) == (True, "ranked", task.prompt)
    service.reopen("me", task.id)
    clock.now += 59
    submit(service, take(service), tiers=[[0, 1, 2, 3]])
    clock.now += 601
    assert not service.recent("me")[0].editable
    for call in (
        lambda: service.undo("me"),
        lambda: service.reopen("me", task.id),
        lambda: service.submit("me", task.id, "another", TIERS),
    ):
        with pytest.raises(DataError, match="saved more than 10 minutes ago: it can no longer be changed"):
            call()
    assert [active for _, active, _ in versions(service)] == [False, True]


def test_an_undone_item_keeps_its_place_for_a_lease(service: LabelService, clock: Clock) -> None:
    task = take(service)
    submit(service, task)
    service.undo("me")
    assert service.store.rankings() == []
    assert {take(service, who).id for who in ("b", "c")} != set()
    assert service.next_task("d") is None, "the undone one is still taken"
    clock.now += 61
    assert take(service, "d").prompt in {f"prompt {n}" for n in range(3)}


def test_an_undo_that_is_sent_again_takes_back_nothing_more(service: LabelService) -> None:
    """The answer to the first one was lost on the way, and the page cannot know."""
    first = take(service)
    submit(service, first)
    second = take(service)
    submit(service, second)
    assert service.last("me") == second.id
    assert [service.undo("me", second.id) for _ in range(3)] == [second.id] * 3
    assert len(service.store.rankings()) == 1
    assert service.last("me") == first.id
    submit(service, take(service))
    with pytest.raises(DataError, match="something else was ranked or skipped after this"):
        service.undo("me", first.id)
    with pytest.raises(DataError, match="not given to 'you'"):
        service.undo("you", first.id)


def test_what_was_skipped_comes_back_only_when_asked_for(service: LabelService) -> None:
    tasks = []
    for _ in range(3):
        tasks.append(take(service))
        service.skip("me", tasks[-1].id)
    assert service.next_task("me") is None
    assert [past.state for past in service.recent("me")] == ["skipped"] * 3
    service.reopen("me", tasks[0].id)
    assert take(service).id == tasks[0].id
    taken = [take(service, "you").prompt for _ in range(1)]
    submit(service, take(service, "you"), "you")
    gone = next(task for task in tasks if task.prompt == taken[0])
    with pytest.raises(DataError, match="others have taken what you skipped"):
        service.reopen("me", gone.id)
    assert not next(past for past in service.recent("me") if past.task_id == gone.id).editable


def test_undo_and_reopen_are_for_ones_own(service: LabelService) -> None:
    task = take(service)
    submit(service, task)
    assert service.undo("you") is None
    for call in (lambda: service.reopen("you", task.id), lambda: service.diff("you", task.id, 0, 1)):
        with pytest.raises(DataError, match="not given to 'you'"):
            call()
    assert service.recent("you") == []


# ------------------------------------------------------------------------------------------------- late


def late_task(service: LabelService, clock: Clock) -> Task:
    """A task whose place went to `quick`, who has not ranked it yet; everything else is ranked."""
    task = take(service, "slow")
    clock.now += 61
    while take(service, "quick").prompt != task.prompt:
        submit(service, take(service, "quick"), "quick")
    while (other := service.next_task("rest")) is not None:
        submit(service, other, "rest")
    return task


def test_a_late_ranking_is_kept_and_trains_nobody(service: LabelService, clock: Clock) -> None:
    task = late_task(service, clock)
    submit(service, task, "slow", seconds=60)
    submit(service, take(service, "quick"), "quick")
    assert "slow" not in {each.annotator for each in service.store.rankings()}
    assert [marks for _, _, marks in versions(service) if "late" in marks] == [["late"]]
    assert service.progress("slow").ranked == 1
    assert service.wanted() == 0


def test_a_late_one_counts_where_the_place_is_free_after_all(service: LabelService, clock: Clock) -> None:
    task = late_task(service, clock)
    service.skip("quick", take(service, "quick").id)
    submit(service, task, "slow", seconds=60)
    assert "slow" in {each.annotator for each in service.store.rankings()}


def test_what_has_gone_to_others_is_not_given_back(service: LabelService, clock: Clock) -> None:
    task = late_task(service, clock)
    assert service.next_task("slow") is None
    service.save_draft("slow", task.id, {"n": 1})
    service.skip("quick", take(service, "quick").id)
    assert take(service, "slow").draft == {"n": 1}, "but it is, once they let it go"


def test_a_late_one_can_be_undone_and_said_again(service: LabelService, clock: Clock) -> None:
    submit(service, late_task(service, clock), "slow", seconds=60)
    service.undo("slow")
    again = take(service, "slow")
    submit(service, again, "slow", tiers=[[0, 1, 2, 3]], seconds=60)
    assert [marks for _, active, marks in versions(service) if active and "late" in marks] == [["late"]]
    submit(service, take(service, "quick"), "quick")
    assert service.wanted() == 0
    assert len(service.store.rankings()) == 3


# ------------------------------------------------------------------------------------------------- keys


def test_a_key_that_was_taken_back_is_refused(service: LabelService) -> None:
    task = take(service)
    submit(service, task)
    service.undo("me")
    with pytest.raises(DataError, match="was taken back: reload the page"):
        submit(service, task)
    again = take(service)
    submit(service, again, tiers=[[0, 1, 2, 3]])
    assert service.submit("me", task.id, task.key, TIERS).repeated, "it is on disk, as a version"
    with pytest.raises(DataError, match="already saved another ranking"):
        submit(service, again)
    other = take(service)
    with pytest.raises(DataError, match="already saved another ranking"):
        service.submit("me", other.id, again.key, TIERS)


def test_a_paused_annotator_still_gets_the_receipt(service: LabelService) -> None:
    """The answer to their submit was lost, and then somebody paused them."""
    task = take(service)
    number = submit(service, task)
    with service.store.write() as connection:
        connection.execute(sa.insert(users).values(name="me", role="annotator", paused=True, created_at=""))
    assert service.submit("me", task.id, task.key, TIERS).ranking_id == number


# ------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("waited", "reported", "stored", "marks"),
    [
        (60, 50, 50, []),
        (60, 500, 60, []),  # nobody looks at something for longer than they have had it
        (60, 3, 3, ["too_fast"]),
        (3, 60, 3, ["too_fast"]),  # the page cannot talk the server out of it
        (60, None, 60, []),
        (3, None, 3, ["too_fast"]),
    ],
)
def test_too_fast_is_marked(
    service: LabelService, clock: Clock, waited: float, reported: float | None, stored: float, marks: list[str]
) -> None:
    """18 words at 2 a second take 9 s."""
    task = take(service)
    clock.now += waited
    submit(service, task, seconds=reported)
    (ranking,) = service.store.rankings()
    assert (ranking.seconds, ranking.flags.get("marks", [])) == (stored, marks)


def test_the_time_of_earlier_versions_counts(service: LabelService, clock: Clock) -> None:
    task = take(service)
    clock.now += 8
    submit(service, task)
    service.reopen("me", task.id)
    clock.now += 2
    submit(service, take(service), tiers=[[0, 1, 2, 3]])
    assert [marks for _, _, marks in versions(service)] == [["too_fast"], []]


# ------------------------------------------------------------------------------------------------- beside the ranking


def test_notes_and_ratings_are_stored_by_completion_and_shown_by_place(service: LabelService) -> None:
    task = take(service)
    flags = {"unclear": False, "note": " look ", "ratings": {"helpful": [5, None, 1, 2]}}
    submit(service, task, flags=flags)
    (saved,) = service.store.rankings()
    by_text = dict(zip(saved.completions, saved.flags["ratings"]["helpful"], strict=True))
    assert by_text == dict(zip(task.completions, [5, None, 1, 2], strict=True))
    assert saved.flags["note"] == "look"
    service.reopen("me", task.id)
    before = take(service).before
    assert before is not None
    assert before.flags == {"note": "look", "ratings": {"helpful": [5, None, 1, 2]}}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"fun": True}, "no flag 'fun'"),
        ({"note": "x" * 1001}, "note has 1001 characters; 1000 are allowed"),
        ({"note": 3}, "note must be a text"),
        ({"ratings": {"harmless": [1, 1, 1, 1]}}, "no criterion 'harmless'; this round has helpful"),
        ({"ratings": {"helpful": [1, 1, 1]}}, "must be a list of 4"),
        ({"ratings": {"helpful": [1, 1, 1, 6]}}, "is 6, but it must be 1 to 5"),
        ({"ratings": {"helpful": [1, 1, 1, True]}}, "is True, but it must be 1 to 5"),
        ({"ratings": [1]}, "must be lists by criterion"),
    ],
)
def test_bad_notes_and_ratings_are_refused(service: LabelService, flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        submit(service, take(service), flags=flags)
    assert service.store.rankings() == []


@pytest.mark.parametrize("flag", ["all_bad", "cannot_judge"])
def test_everything_may_be_set_aside_where_it_is_said_why(service: LabelService, flag: str) -> None:
    task = take(service)
    with pytest.raises(DataError, match="at least two"):
        service.submit("me", task.id, "k", [], [0, 1, 2, 3], flags={"unsafe": True})
    with pytest.raises(DataError, match="at least two"):
        service.submit("me", task.id, "k", [[0]], [1, 2, 3], flags={flag: True})
    service.submit("me", task.id, "k", [], [0, 1, 2, 3], flags={flag: True})
    (saved,) = service.store.rankings()
    assert saved.ranks == (None,) * 4
    assert list(saved.comparisons()) == []


def test_texts_that_no_database_takes(service: LabelService) -> None:
    submit(service, take(service), rationale="a\0b\ud800", flags={"note": "\0"})
    (saved,) = service.store.rankings()
    assert (saved.rationale, saved.flags) == ("ab?", {"marks": ["too_fast"]})


def test_a_diff_is_of_the_places_shown(service: LabelService) -> None:
    task = take(service)
    pieces = service.diff("me", task.id, 0, 1)
    assert "".join(text for kind, text in pieces if kind != "new") == task.completions[0]
    assert "".join(text for kind, text in pieces if kind != "gone") == task.completions[1]
    for place in (4, -1, True):
        with pytest.raises(DataError, match="is not one of the 4 completions"):
            service.diff("me", task.id, 0, place)


def test_undo_and_submit_from_two_tabs_at_once(service: LabelService) -> None:
    task = take(service)
    submit(service, task)
    outcomes: list[object] = []

    def tab(call: Any) -> None:
        try:
            outcomes.append(call())
        except DataError as error:
            outcomes.append(error)

    calls = [lambda: service.undo("me"), lambda: service.submit("me", task.id, "other", [[0, 1, 2, 3]])] * 4
    threads = [threading.Thread(target=tab, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert sum(active for _, active, _ in versions(service)) <= 1
    assert [version for version, _, _ in versions(service)] == list(range(1, len(versions(service)) + 1))

"""The ranking page in a real browser: what a person does reaches the store as they meant it, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.page_world import Site, Visit, ranks_by_text

FILMS = [(f"film {n}", [f"text {n}{letter}" for letter in "wxyz"]) for n in range(3)]
TWO = [("p", ["x", "y"]), ("q", ["v", "w"])]
Serve = Callable[..., Site]
Open = Callable[..., Visit]


def prompt(me: Visit) -> str:
    return me.page.locator("#prompt").inner_text()


def test_three_items_reach_the_store_as_they_were_meant(site: Serve, visit: Open) -> None:
    """Cards, keyboard and mouse in turn; the expectation comes from the texts as the browser shows them."""
    where = site(*FILMS)
    me = visit(where)
    expected: dict[str, dict[str, int | None]] = {}

    shown, about = me.written(), prompt(me)
    assert sorted(shown) == ["A", "B", "C", "D"]
    for letter, rank in zip("ABCD", (2, 1, 2, 4), strict=True):
        assert me.page.locator(".submit").is_disabled()
        me.put(letter, rank)
    assert me.rows() == {"pool": [], "0": ["B"], "1": ["A", "C"], "2": [], "3": ["D"], "aside": []}
    assert me.row(1).locator("em").inner_text() == "tie"
    expected[about] = {shown["A"]: 2, shown["B"]: 1, shown["C"]: 2, shown["D"]: 3}
    me.submit()
    me.progress("1 ranked · 2 to go")

    shown, about = me.written(), prompt(me)
    me.press("d", "1", "b", "2", "a", "3", "c", "0")
    expected[about] = {shown["D"]: 1, shown["B"]: 2, shown["A"]: 3, shown["C"]: None}
    me.press("Control+Enter")
    me.progress("2 ranked · 1 to go")

    shown, about = me.written(), prompt(me)
    me.drag(me.chip("C"), 0)
    me.drag(me.card("A").locator(".card-letter"), 3)
    me.drag(me.chip("D"), 3)
    me.drag(me.chip("B"), "aside")
    me.chip("B").click()
    me.row(1).click()
    assert me.rows() == {"pool": [], "0": ["C"], "1": ["B"], "2": [], "3": ["A", "D"], "aside": []}
    expected[about] = {shown["C"]: 1, shown["B"]: 2, shown["A"]: 3, shown["D"]: 3}
    me.submit()
    me.progress("3 ranked · 0 to go")
    me.ready("finished")
    assert "Everything is ranked" in me.page.locator("#message").inner_text()

    saved = where.store.rankings()
    assert len(saved) == 3
    for ranking in saved:
        (about,) = [seen for seen in expected if str(ranking.prompt) in seen]
        assert ranks_by_text(ranking) == expected[about]
        assert ranking.annotator == "me"
        assert ranking.seconds is not None
    assert me.problems == []


def test_the_keyboard_alone_is_enough(site: Serve, visit: Open) -> None:
    """Digits place the next card, `=` ties, arrows move, Backspace takes back; nothing is ever clicked."""
    where = site(*FILMS)
    me = visit(where)
    shown = me.written()
    me.press("2", "1", "=", "4")
    assert me.rows() == {"pool": [], "0": ["B", "C"], "1": ["A"], "2": [], "3": ["D"], "aside": []}
    me.press("d", "ArrowUp", "Backspace", "c", "ArrowDown", "ArrowDown", "Escape")
    assert me.rows() == {"pool": ["D"], "0": ["B"], "1": ["A"], "2": ["C"], "3": [], "aside": []}
    me.press("0")
    me.page.wait_for_function(
        "document.querySelector('.for-readers').textContent.startsWith('D: set aside. All are placed')"
    )
    me.press("Shift+N")
    me.press("Tab", "Tab", "Tab", "Space", "Tab")
    me.page.keyboard.type("B is right, 1 2 3 g s u")
    me.press("Escape", "Control+Enter")
    me.progress("1 ranked · 2 to go")
    me.press("Shift+S")
    me.progress("1 ranked · 1 to go · 1 skipped")
    me.press("Shift+U")
    me.progress("1 ranked · 2 to go")
    me.press("?")
    me.page.get_by_role("dialog", name="Keyboard").wait_for()
    me.press("1", "Escape")
    assert me.rows()["pool"] == ["A", "B", "C", "D"]
    me.press("g")
    me.page.get_by_text("Rank the completions from best to worst").wait_for()
    me.press("Escape")
    (ranking,) = where.store.rankings()
    assert ranks_by_text(ranking) == {shown["B"]: 1, shown["A"]: 2, shown["C"]: 3, shown["D"]: None}
    assert (ranking.rationale, ranking.flags) == ("B is right, 1 2 3 g s u", {"unsafe": True})
    assert me.problems == []


def test_no_single_bare_key_ends_or_replaces_the_work(site: Serve, visit: Open) -> None:
    where = site(*TWO)
    me = visit(where)
    me.press("1", "2")
    about = prompt(me)
    for key in (*"su", "Delete", "Enter", "Escape", "Space", "PageDown", "End"):
        me.page.locator("body").press(key)
    assert (prompt(me), me.rows()["pool"]) == (about, [])
    assert where.rankings_ever_saved() == 0


def test_a_double_click_saves_once(site: Serve, visit: Open) -> None:
    where = site(*TWO)
    me = visit(where)
    me.put("A", 1)
    me.put("B", 2)
    me.page.locator(".submit").dblclick()
    me.progress("1 ranked · 1 to go")
    assert where.rankings_ever_saved() == 1


def test_a_lost_answer_is_asked_for_again_and_saved_once(site: Serve, visit: Open) -> None:
    where = site(("p", ["x", "y"]))
    me = visit(where)
    keys = []

    def lose_the_first_answer(route: Any) -> None:
        keys.append(route.request.post_data_json["key"])
        if len(keys) == 1:
            route.fetch()  # the server saves it
            route.abort()
        else:
            route.continue_()

    me.page.route("**/api/v1/submit", lose_the_first_answer)
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.ready("finished")
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert where.rankings_ever_saved() == 1


def test_saved_is_said_only_when_it_is(site: Serve, visit: Open) -> None:
    where = site(("p", ["x", "y"]))
    me = visit(where)
    me.page.route("**/api/v1/submit", lambda route: route.abort())
    me.put("A", 1)
    me.put("B", 2)
    me.page.locator(".submit").click()
    me.shows("Not saved")
    assert me.rows()["0"] == ["A"]
    assert where.rankings_ever_saved() == 0
    me.page.unroute("**/api/v1/submit")
    me.submit()
    me.ready("finished")
    assert where.rankings_ever_saved() == 1


def test_undo_skip_and_a_change_of_what_was_submitted(site: Serve, visit: Open) -> None:
    where = site(*TWO)
    me = visit(where)
    first, about = me.written(), prompt(me)
    me.put("A", 2)
    me.put("B", 1)
    me.submit()
    me.progress("1 ranked · 1 to go")
    me.page.get_by_role("button", name="Skip").click()
    me.progress("1 ranked · 0 to go · 1 skipped")
    me.page.get_by_role("button", name="Change the last one").click()
    me.progress("1 ranked · 1 to go")
    me.ready()
    me.page.get_by_role("button", name="Recent").click()
    me.page.get_by_role("button", name="Change: ").click()
    me.page.wait_for_function("document.querySelector('.rank-row[data-row=\"0\"] .chip')?.innerText === 'B'")
    assert me.written() == first
    assert prompt(me) == about
    me.put("A", 1)
    me.submit()
    me.progress("1 ranked · 1 to go")
    (ranking,) = where.store.rankings()
    assert ranks_by_text(ranking) == {first["A"]: 1, first["B"]: 1}
    assert where.rankings_ever_saved() == 2
    assert me.problems == []


def test_flags_a_note_and_ratings_are_kept_and_nothing_needs_a_rank_where_all_are_bad(site: Serve, visit: Open) -> None:
    where = site(("p", ["x", "y", "z"]), criteria=["helpful", "true"])
    me = visit(where)
    shown = me.written()
    me.page.get_by_role("button", name="B: helpful 4 of 5").click()
    me.page.locator(".notes summary").click()
    assert me.page.get_by_role("button", name="Set every card aside").is_hidden()
    me.page.get_by_label("All completions are bad").check()
    me.page.get_by_label("Anything wrong with this item?").fill("${because} <b>it</b> is")
    me.page.get_by_role("button", name="Set every card aside").click()
    me.submit()
    me.ready("finished")
    (ranking,) = where.store.rankings()
    place = list(ranking.completions).index(shown["B"])
    ratings = {"helpful": [4 if index == place else None for index in range(3)]}
    assert ranking.ranks == (None, None, None)
    assert ranking.flags == {"all_bad": True, "note": "${because} <b>it</b> is", "ratings": ratings}

"""What is not submitted yet survives: reloads, another browser, two tabs, an ended session, a server that is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from labeling_ui.auth import Accounts
from rlhf import schema
from tests.e2e.page_world import Site, Visit, another_tab, opened, ranks_by_text
from tests.e2e.test_page import FILMS, TWO, Open, Serve

PASSWORD = "a lamp in the fog"


def half_done(me: Visit) -> dict[str, list[str]]:
    """Place three of four cards, with a thought and a rating; returns the rows."""
    me.put("C", 1)
    me.put("A", 1)
    me.press("d", "0")
    me.page.locator(".notes summary").click()
    me.page.get_by_label("Why this order?").fill("half a thought")
    me.page.get_by_label("Something here is unsafe").check()
    me.page.get_by_role("button", name="B: helpful 3 of 5").click()
    return {"pool": ["B"], "0": ["A", "C"], "1": [], "2": [], "3": [], "aside": ["D"]}


def is_half_done(me: Visit) -> bool:
    me.page.wait_for_function("document.querySelector('.rank-row[data-row=\"0\"] .chip') !== null")
    return (
        me.rows() == {"pool": ["B"], "0": ["A", "C"], "1": [], "2": [], "3": [], "aside": ["D"]}
        and me.page.get_by_label("Why this order?").input_value() == "half a thought"
        and me.page.get_by_label("Something here is unsafe").is_checked()
        and me.page.get_by_role("button", name="B: helpful 3 of 5").get_attribute("aria-pressed") == "true"
        and me.page.locator(".submit").is_disabled()
    )


def test_a_draft_comes_back_in_this_browser_and_from_the_server_in_another(site: Serve, visit: Open) -> None:
    where = site(*FILMS, criteria=["helpful"])
    me = visit(where)
    texts = me.written()
    half_done(me)
    me.draft_saved()
    (kept,) = where.drafts()
    assert kept["rationale"] == "half a thought"
    me.page.goto("about:blank")  # a reload would let the browser restore the form by itself
    me.page.goto(where.url)
    assert is_half_done(me.ready())
    assert me.written() == texts
    elsewhere = visit(where)
    assert is_half_done(elsewhere)
    assert me.problems == elsewhere.problems == []


def eventually(happened: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_leaving_at_once_still_sends_the_draft(site: Serve, visit: Open) -> None:
    where = site(*FILMS, criteria=["helpful"])
    me = visit(where)
    half_done(me)
    me.page.close()
    eventually(where.drafts)
    (kept,) = where.drafts()
    assert kept["rationale"] == "half a thought"
    assert kept["ratings"] == {"helpful": [None, 3, None, None]}


def test_without_the_server_the_draft_stays_in_this_browser_and_nothing_else_is_claimed(
    site: Serve, visit: Open
) -> None:
    where = site(*FILMS, criteria=["helpful"])
    me = visit(where)
    me.page.route("**/api/v1/draft", lambda route: route.abort())
    half_done(me)
    me.shows("Draft kept in this browser only", ".draft-status")
    warned = me.page.evaluate("!dispatchEvent(new Event('beforeunload', {cancelable: true}))")
    assert warned
    assert where.drafts() == []
    me.page.goto("about:blank")
    me.page.unroute("**/api/v1/draft")
    me.page.goto(where.url)
    assert is_half_done(me.ready())
    eventually(lambda: len(where.drafts()) == 1)  # from the page that was left, or from this one
    eventually(lambda: not me.page.evaluate("!dispatchEvent(new Event('beforeunload', {cancelable: true}))"))


def one_of_two_ranked(site: Serve, visit: Open) -> tuple[Site, Visit]:
    where = site(*TWO)
    me = visit(where)
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.progress("1 ranked")
    return where, me


def test_a_draft_ends_with_its_item(site: Serve, visit: Open) -> None:
    where, me = one_of_two_ranked(site, visit)
    assert me.rows()["pool"] == ["A", "B"]
    assert where.drafts() == []
    assert me.page.evaluate("Object.keys(localStorage).filter(name => name.startsWith('rlhf-draft'))") == []


def test_what_is_said_in_one_tab_shows_in_the_other_and_counts_once(site: Serve, visit: Open) -> None:
    where = site(*FILMS, criteria=["helpful"])
    me = visit(where)
    other = another_tab(me.page.context, where.url).ready()
    half_done(me)
    assert is_half_done(other)
    me.press("Escape")
    me.put("B", 2)
    me.submit()
    me.progress("1 ranked")
    other.shows("This item was ended in another tab.", ".trouble span")
    assert other.page.locator(".submit").is_disabled()
    other.page.get_by_role("button", name="Next item").click()
    other.progress("1 ranked · 2 to go")
    assert other.written() == me.written()
    assert where.rankings_ever_saved() == 1


def test_a_browser_that_comes_late_is_told_and_loses_nothing(site: Serve, visit: Open) -> None:
    """Two browsers share nothing: the second hears from the server."""
    where = site(*TWO)
    me, late = visit(where), visit(where)
    shown = me.written()
    me.press("1", "2", "Control+Enter")
    me.progress("1 ranked")
    late.press("2", "1")
    late.page.locator(".trouble, .submit:not([disabled])").first.wait_for()
    late.page.wait_for_function("!document.querySelector('.trouble').hidden")
    late.page.get_by_role("button", name="Next item").click()
    late.progress("1 ranked · 1 to go")
    (ranking,) = where.store.rankings()
    assert ranks_by_text(ranking) == {shown["A"]: 1, shown["B"]: 2}


@pytest.fixture
def annotator(site: Serve, browser: Any) -> Any:
    """`annotator(items)` serves a page with accounts and logs Ann in: (site, visit)."""
    contexts = []

    def start(*items: Any) -> tuple[Site, Visit]:
        where = site(*items, accounts=True)
        accounts = Accounts(where.store)
        accounts.join(accounts.invite("annotator"), "ann", PASSWORD)
        me = opened(browser, where.url)
        contexts.append(me.page.context)
        log_in(me.page)
        return where, me.ready()

    yield start
    for context in contexts:
        context.close()


def log_in(page: Any) -> None:
    page.get_by_label("Name").fill("ann")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()


def end_sessions(where: Site) -> None:
    with where.store.write() as connection:
        connection.execute(sa.delete(schema.sessions))


def test_an_ended_session_keeps_the_draft_and_goes_on_after_a_login(annotator: Callable[..., Any]) -> None:
    where, me = annotator(*TWO)
    shown = me.written()
    me.put("A", 1)
    me.draft_saved()
    end_sessions(where)
    me.put("B", 2)
    me.shows("Your session has ended", ".trouble span")
    me.page.locator(".submit").click()
    me.page.wait_for_function("document.querySelector('.submit').textContent === 'Submit ranking'")
    assert where.rankings_ever_saved() == 0
    assert me.rows() == {"pool": [], "0": ["A"], "1": ["B"], "aside": []}
    with me.page.context.expect_page() as entrance:
        me.page.get_by_role("link", name="Log in in a new tab").click()
    log_in(entrance.value)
    entrance.value.wait_for_selector('body[data-screen="rank"]')
    entrance.value.close()
    me.page.evaluate("dispatchEvent(new Event('focus'))")
    me.progress("1 ranked · 1 to go")
    assert me.page.locator(".trouble").is_hidden()
    (ranking,) = where.store.rankings()
    assert ranking.annotator == "ann"
    assert ranks_by_text(ranking) == {shown["A"]: 1, shown["B"]: 2}


def test_what_was_changed_after_the_session_ended_is_not_overtaken_by_what_was_refused(
    annotator: Callable[..., Any],
) -> None:
    where, me = annotator(*TWO)
    shown = me.written()
    me.put("A", 1)
    me.put("B", 2)
    me.draft_saved()
    end_sessions(where)
    me.page.locator(".submit").click()
    me.shows("Your session has ended", ".trouble span")
    me.put("A", 2)
    me.put("B", 1)
    with me.page.context.expect_page() as entrance:
        me.page.get_by_role("link", name="Log in in a new tab").click()
    log_in(entrance.value)
    entrance.value.wait_for_selector('body[data-screen="rank"]')
    entrance.value.close()
    me.page.evaluate("dispatchEvent(new Event('focus'))")
    me.draft_saved()
    assert where.rankings_ever_saved() == 0
    me.submit()
    me.progress("1 ranked · 1 to go")
    (ranking,) = where.store.rankings()
    assert ranks_by_text(ranking) == {shown["A"]: 2, shown["B"]: 1}


def test_a_refused_undo_leaves_the_item_in_hand_alone(site: Serve, visit: Open) -> None:
    where = site(*TWO)
    me = visit(where)
    me.press("Shift+S")
    me.progress("0 ranked")
    me.page.wait_for_function("document.querySelector('.status').textContent === 'Skipped'")
    others = where.service.next_task("you")
    assert others is not None
    where.service.submit("you", others.id, others.key, [[0], [1]])
    me.put("A", 1)
    me.press("Shift+U")
    me.shows("others have taken what you skipped")
    me.put("B", 2)
    me.submit()
    me.ready("finished")


def test_a_draft_that_comes_late_says_nothing_about_the_next_item(site: Serve, visit: Open) -> None:
    """A draft on its way, another that waits for it, and a submit in between."""
    where = site(*TWO)
    me = visit(where)
    held: list[Any] = []
    me.page.route("**/api/v1/draft", lambda route: held.append(route))
    me.put("A", 1)
    me.page.wait_for_timeout(2000)
    me.put("B", 2)
    me.page.wait_for_timeout(2000)
    me.page.locator(".submit").click()
    held[0].continue_()
    me.progress("1 ranked · 1 to go")
    for late in held[1:]:
        late.continue_()
    me.page.wait_for_timeout(1000)
    assert me.page.locator(".trouble").is_hidden()
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.ready("finished")
    assert me.problems == []


def test_an_edit_that_was_broken_off_does_not_come_back_as_a_draft(site: Serve, visit: Open) -> None:
    _, me = one_of_two_ranked(site, visit)
    for change in (True, False):
        me.press("r")
        me.page.get_by_role("button", name="Change").first.click()
        me.shows("Here it is again")
        me.page.wait_for_function("document.querySelector('.rank-row[data-row=\"0\"] .chip') !== null")
        assert me.rows()["0"] == ["A"]
        if change:
            me.put("A", 2)
            me.put("B", 1)
            me.draft_saved()
            me.press("Shift+S")
            me.progress("1 ranked")


def test_a_paused_annotator_reads_why(annotator: Callable[..., Any]) -> None:
    where, me = annotator(*TWO)
    Accounts(where.store).pause("ann")
    me.put("A", 1)
    me.put("B", 2)
    me.page.locator(".submit").click()
    me.shows("Not saved")
    assert "paused" in me.page.locator(".status").inner_text()
    me.page.reload()
    me.ready("stopped")
    assert "paused" in me.page.locator("#message").inner_text()
    assert where.drafts() != []

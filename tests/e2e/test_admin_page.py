"""The admin page in a real browser: what stands on it is what the store holds, and only admins get it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labeling_ui.auth import Accounts
from labeling_ui.person import Person
from rlhf.figures import text
from rlhf.rankings import read_rankings
from rlhf.types import DataError, Ranking
from tests.e2e.admin_shots import enter
from tests.e2e.admin_world import PASSWORD, PEOPLE, World, running

ROOT = Person("root", "admin")
HOSTILE = (
    "<img src=x onerror=window.pwned=1>${window.pwned=2}</td></table><script>window.pwned=3</script>{{7*7}}\u202ebidi"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("admin"), items=24) as world:
        said = {"flags": {"unclear": True, "note": HOSTILE}, "rationale": HOSTILE}
        pair = (HOSTILE, f"{HOSTILE} again")
        for who, ranks in ((HOSTILE, (1, 2)), ("ada", (2, 1))):
            world.store.import_rankings([Ranking(HOSTILE, pair, ranks, who, **said)])
        yield world


@pytest.fixture
def page(browser: Any, world: World) -> Iterator[Any]:
    """Logged in as the admin; at the end nothing ran that should not, and no other site was asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda sent: None if sent.url.startswith((world.url, "data:", "blob:")) else problems.append(sent.url),
    )
    enter(page, world.url, "root")
    page.goto(f"{world.url}admin/")
    page.locator("#queue-board .tiles").wait_for()
    yield page
    assert page.evaluate("window.pwned") is None
    assert problems == []
    context.close()


def open_tab(page: Any, name: str) -> Any:
    page.get_by_role("tab", name=name).click()
    board = page.locator(f"#{name.lower()}-board")
    board.locator("table").first.wait_for()
    return board


def cells(board: Any, first: str) -> list[str]:
    """The row of a table that begins with this."""
    rows = board.locator("tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText))")
    return next(row for row in rows if row[0] == first)


def test_the_numbers_on_the_page_are_those_of_the_store(page: Any, world: World) -> None:
    found = world.admin.overview(ROOT)
    coverage = cells(page.locator("#queue-board"), "0")
    first = found.coverage[0]
    assert coverage[2:6] == [str(each) for each in (first.items, first.complete, first.wanted, first.done)]
    rate = world.admin.together(ROOT).agreement.without_ties
    assert rate.value is not None
    assert 0.5 < rate.value < 0.95
    assert cells(open_tab(page, "Agreement"), "Pairwise agreement, ties left out")[1].split()[0] == f"{rate.value:.2f}"
    board = open_tab(page, "Annotators")
    for report in world.admin.people(ROOT).reports:
        value = report.reliability.value
        shown = cells(board, report.name)
        assert shown[1] == str(report.rankings)
        assert shown[3].split()[0] == ("-" if value is None else f"{value:.2f}")
    assert "emil" in board.locator(".concerns").inner_text()
    assert board.locator("figure svg").count() == 5
    board = open_tab(page, "Disputes")
    worst = world.admin.disputed(ROOT)[0]
    assert worst.disagreement > 0
    assert cells(board, f"#{worst.item_id}")[3:5] == [f"{worst.doubt:.2f}", f"{worst.disagreement:.2f}"]


def test_hostile_names_and_notes_are_text(page: Any) -> None:
    flagged = page.locator("#queue-board tr", has_text=HOSTILE[:30]).evaluate_all(
        "rows => rows.map(row => [...row.cells].slice(0, 4).map(cell => cell.innerText))"
    )
    assert flagged == [["#37", "ada", "unclear", HOSTILE], ["#37", HOSTILE, "unclear", HOSTILE]]
    assert cells(open_tab(page, "Annotators"), HOSTILE)[1] == "1"
    open_tab(page, "Disputes")
    page.get_by_label("Item to adjudicate").fill("37")
    page.get_by_role("button", name="Open this item").click()
    page.locator("#case-cards article").first.wait_for()
    assert page.locator("#case-cards .prompt pre").inner_text() == HOSTILE
    assert sorted(page.locator("#case-cards article pre").all_inner_texts()) == [HOSTILE, f"{HOSTILE} again"]
    page.get_by_role("button", name="Show what the annotators said").click()
    page.locator("#statements table").wait_for()
    assert cells(page.locator("#statements"), HOSTILE)[3] == f"{HOSTILE} {HOSTILE}"
    assert text(HOSTILE).count("<") == 0


def test_pausing_asks_once_more_and_then_holds(page: Any, world: World) -> None:
    open_tab(page, "Annotators")
    who = page.get_by_label("Pause or resume an annotator")
    who.click()
    page.get_by_role("option", name="emil").click()
    page.get_by_role("button", name="Pause ...").click()
    page.locator("#sure").get_by_text("emil gets no more items").wait_for()
    page.get_by_role("button", name="No", exact=True).click()
    page.locator("#sure").wait_for(state="hidden")
    assert world.admin.paused(ROOT)["emil"] is False
    page.get_by_role("button", name="Pause ...").click()
    page.get_by_role("button", name="Yes, pause").click()
    page.locator("#pause-notice").get_by_text("emil is paused").wait_for()
    assert cells(page.locator("#annotators-board"), "emil (paused)")
    with pytest.raises(DataError, match="paused"):
        world.service.next_task("emil")
    page.get_by_role("button", name="Resume ...").click()
    page.get_by_role("button", name="Yes, resume").click()
    page.locator("#pause-notice").get_by_text("emil gets items again").wait_for()
    world.service.next_task("emil")


def test_a_last_word_is_what_is_downloaded(page: Any, world: World, tmp_path: Path) -> None:
    board = open_tab(page, "Disputes")
    item = board.locator('[data-item]:not([data-item="37"])').first
    number = int(item.get_attribute("data-item"))
    item.click()
    page.locator("#case-cards article").first.wait_for()
    assert page.locator("#statements table").count() == 0
    shown = world.admin.case(ROOT, number)
    order = page.get_by_label("Your ranking, best first")
    order.fill("B > A")
    page.get_by_role("button", name="Save as the last word").click()
    page.locator("#dispute-notice").get_by_text("is missing: rank it").wait_for()
    order.fill("b > a = d / c")
    page.get_by_role("button", name="Save as the last word").click()
    page.locator("#dispute-notice").get_by_text(f"last word on item {number}").wait_for()
    assert cells(board, f"#{number}")[5] == "root"
    page.get_by_role("tab", name="Data").click()
    with page.expect_download() as caught:
        page.get_by_role("link", name="rankings.jsonl").click()
    caught.value.save_as(tmp_path / "rankings.jsonl")
    found = [each for each in read_rankings(tmp_path / "rankings.jsonl").rankings if each.prompt == shown.prompt]
    assert [each.annotator for each in found] == ["root"]
    by_text = dict(zip(found[0].completions, found[0].ranks, strict=True))
    assert [by_text[each] for each in shown.completions] == [2, 1, None, 2]


def test_annotators_reach_no_page_no_event_and_no_download(browser: Any, world: World) -> None:
    context = browser.new_context()
    page = context.new_page()
    enter(page, world.url, "ada")
    token = next(each["value"] for each in context.cookies() if each["name"] == "rlhf-csrf")
    headers = {"X-CSRF-Token": token, "Origin": world.url.rstrip("/")}
    send = context.request
    for path in ("admin", "admin/", "admin/config", "api/v1/admin/export/rankings.jsonl"):
        assert send.get(world.url + path).status == 403, path
    with world.store.read() as connection:
        before = connection.exec_driver_sql("select count(*) from events").scalar()
    for index in range(40):
        body = {"data": ["1"] * 6, "fn_index": index, "session_hash": "x"}
        answer = send.post(f"{world.url}admin/gradio_api/run/predict", headers=headers, data=json.dumps(body))
        assert answer.status == 403, index
    with world.store.read() as connection:
        assert connection.exec_driver_sql("select count(*) from events").scalar() == before
    context.close()


def test_everybody_can_log_in_with_the_worlds_password(world: World) -> None:
    """Or the refusals above would say nothing."""
    accounts = world.admin.accounts
    assert isinstance(accounts, Accounts)
    assert {accounts.login(each.name, PASSWORD).session.person.role for each in PEOPLE} == {"annotator"}


def test_one_person_alone_is_the_admin(browser: Any, tmp_path: Path) -> None:
    with running(tmp_path, items=8, accounts=False) as alone:
        page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{alone.url}admin/")
        page.locator("#queue-board .tiles").wait_for()
        open_tab(page, "Annotators")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.context.close()

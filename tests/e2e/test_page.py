"""The ranking page in a real browser: what a person does reaches the store as they meant it, once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import uvicorn

from labeling_ui import app
from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService
from rlhf import schema
from rlhf.store import Store
from rlhf.types import Completion, Ranking

HOSTILE = [
    '<img src=x onerror="window.pwned=1">',
    "${window.pwned=2} {{constructor}} \\ `${HOME}`",
    "</script><script>window.pwned=3</script>",
    "[click](javascript:window.pwned=4) ![x](http://evil.example/t.png)",
]
HOSTILE_PROMPT = "A <b>bold</b> prompt ${window.pwned=5} <iframe src='http://evil.example'></iframe>"


@dataclass
class Site:
    """A running page over a store of its own."""

    url: str
    store: Store

    def rankings_ever_saved(self) -> int:
        with self.store.read() as connection:
            return connection.scalars(sa.select(sa.func.count()).select_from(schema.rankings)).one()


@dataclass
class Visit:
    """A person at the page."""

    page: Any
    problems: list[str] = field(default_factory=list)

    def ready(self) -> Visit:
        self.page.wait_for_selector("#rank .rank-submit, #rank .rank-plain")
        self.page.wait_for_function("document.querySelector('.progress-text').textContent.includes('to go')")
        return self

    def texts(self) -> dict[str, str]:
        """What stands on each visible card, by letter."""
        letters = self.page.locator("#cards .card:visible .card-letter").all_inner_texts()
        return {letter: self.page.locator(f"#card-{letter}").inner_text().strip() for letter in letters}

    def rows(self) -> dict[str, list[str]]:
        """The letters in each row of the widget."""
        rows = self.page.locator(".rank-row").all()
        return {row.get_attribute("data-row"): row.locator(".rank-chip").all_inner_texts() for row in rows}

    def put(self, letter: str, rank: int) -> None:
        self.page.get_by_role("button", name=f"Rank {letter} {rank}", exact=True).click()

    def chip(self, letter: str) -> Any:
        return self.page.locator(".rank-chip", has_text=letter)

    def row(self, name: str | int) -> Any:
        return self.page.locator(f'.rank-row[data-row="{name}"]')

    def drag(self, letter: str, row: str | int) -> None:
        start, end = self.chip(letter).bounding_box(), self.row(row).bounding_box()
        self.page.mouse.move(start["x"] + 10, start["y"] + 10)
        self.page.mouse.down()
        self.page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=6)
        self.page.mouse.up()

    def submit(self) -> None:
        self.page.locator(".rank-submit").click()
        self.shows("Saved")

    def shows(self, status: str) -> None:
        self.page.wait_for_function(
            "text => document.querySelector('.rank-status').textContent.startsWith(text)", arg=status
        )

    def progress(self, text: str) -> None:
        self.page.wait_for_function(
            "text => document.querySelector('.progress-text').textContent.startsWith(text)", arg=text
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(*items: tuple[Any, list[str]]) -> Site:
        store = Store(tmp_path / "labels.db")
        for prompt, texts in items:
            store.add_completions(prompt, [Completion(text, "secret-model", n) for n, text in enumerate(texts)])
        service = LabelService(store, Policy())
        slots = max(len(texts) for _, texts in items)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app.create(service, "me", slots=slots), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        deadline = time.monotonic() + 120
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        return Site(f"http://127.0.0.1:{listener.getsockname()[1]}/", store)

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def start(site: Site, width: int = 1280, height: int = 900, **options: Any) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        visit = Visit(context.new_page())
        visit.page.set_default_timeout(60_000)
        visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
        visit.page.on("dialog", lambda dialog: visit.problems.append(dialog.message))
        visit.page.on(
            "request",
            lambda request: (
                None if request.url.startswith((site.url, "data:", "blob:")) else visit.problems.append(request.url)
            ),
        )
        visit.page.goto(site.url)
        return visit.ready()

    yield start
    for context in contexts:
        context.close()


def ranks_by_text(ranking: Ranking) -> dict[str, int | None]:
    return dict(zip(ranking.completions, ranking.ranks, strict=True))


FILMS = [(f"film {n}", [f"text {n}{letter}" for letter in "wxyz"]) for n in range(3)]


def test_three_items_by_hand_reach_the_store_as_they_were_meant(
    site: Callable[..., Site], visit: Callable[..., Visit]
) -> None:
    """Cards, keyboard and mouse in turn; the expectation comes from the texts as the browser shows them."""
    where = site(*FILMS)
    me = visit(where)
    expected: dict[str, dict[str, int | None]] = {}

    shown, prompt = me.texts(), me.page.locator("#prompt").inner_text()
    assert sorted(shown) == ["A", "B", "C", "D"]
    for letter, rank in zip("ABCD", (2, 1, 2, 4), strict=True):
        assert me.page.locator(".rank-submit").is_disabled()
        me.put(letter, rank)
    assert me.rows() == {"pool": [], "0": ["B"], "1": ["A", "C"], "2": [], "3": ["D"], "aside": []}
    expected[prompt] = {shown["A"]: 2, shown["B"]: 1, shown["C"]: 2, shown["D"]: 3}
    me.submit()
    me.progress("1 ranked · 2 to go")

    shown, prompt = me.texts(), me.page.locator("#prompt").inner_text()
    for keys in ("d1", "b2", "a3", "c0"):
        for key in keys:
            me.page.keyboard.press(key)
    expected[prompt] = {shown["D"]: 1, shown["B"]: 2, shown["A"]: 3, shown["C"]: None}
    me.page.keyboard.press("Control+Enter")
    me.progress("2 ranked · 1 to go")

    shown, prompt = me.texts(), me.page.locator("#prompt").inner_text()
    me.drag("C", 0)
    me.drag("A", 3)
    me.drag("D", 3)
    me.drag("B", "aside")
    me.chip("B").click()
    me.row(1).click()
    assert me.rows() == {"pool": [], "0": ["C"], "1": ["B"], "2": [], "3": ["A", "D"], "aside": []}
    expected[prompt] = {shown["C"]: 1, shown["B"]: 2, shown["A"]: 3, shown["D"]: 3}
    me.page.locator(".rank-notes summary").click()
    me.page.locator(".rank-notes textarea").fill("${because} <b>it</b> is")
    me.page.get_by_label("Something here is unsafe").check()
    me.submit()
    me.progress("3 ranked · 0 to go")
    assert "Everything is ranked" in me.page.locator("#prompt").inner_text()

    saved = where.store.rankings()
    assert len(saved) == 3
    for ranking in saved:
        (prompt,) = [seen for seen in expected if str(ranking.prompt) in seen]
        assert ranks_by_text(ranking) == expected[prompt]
        assert ranking.annotator == "me"
        assert ranking.seconds is not None
    assert [(r.rationale, r.flags) for r in saved if r.rationale] == [("${because} <b>it</b> is", {"unsafe": True})]
    assert me.problems == []


def test_hostile_texts_are_shown_and_do_nothing(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    where = site((HOSTILE_PROMPT, HOSTILE))
    me = visit(where)
    texts = me.texts().values()
    assert HOSTILE_PROMPT in me.page.locator("#prompt").inner_text()
    assert HOSTILE[0] in texts
    assert HOSTILE[2] in texts
    assert any("${window.pwned=2} {{constructor}}" in text and "${HOME}" in text for text in texts)
    assert "secret-model" not in me.page.content()
    assert me.page.locator("#cards img, #prompt iframe, #cards script").count() == 0
    links = me.page.locator("#cards a").all()
    assert not [link for link in links if (link.get_attribute("href") or "").startswith("javascript")]
    me.page.get_by_text("click", exact=True).click()
    for number, letter in enumerate("ABCD"):
        me.put(letter, number + 1)
    me.submit()
    assert me.page.evaluate("window.pwned") is None
    assert me.problems == []
    assert set(where.store.rankings()[0].completions) == set(HOSTILE)


def test_a_double_click_saves_once(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    where = site(("p", ["x", "y"]), ("q", ["v", "w"]))
    me = visit(where)
    me.put("A", 1)
    me.put("B", 2)
    me.page.locator(".rank-submit").dblclick()
    me.progress("1 ranked · 1 to go")
    assert where.rankings_ever_saved() == 1


def test_a_reload_keeps_what_was_placed(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    me = visit(site(*FILMS))
    me.put("C", 1)
    me.put("A", 1)
    me.page.keyboard.press("d")
    me.page.keyboard.press("0")
    me.page.locator(".rank-notes summary").click()
    me.page.locator(".rank-notes textarea").fill("half a thought")
    before = (me.texts(), me.rows())
    me.page.reload()
    me.ready()
    assert (me.texts(), me.rows()) == before
    assert me.rows() == {"pool": ["B"], "0": ["A", "C"], "1": [], "2": [], "3": [], "aside": ["D"]}
    assert me.page.locator(".rank-notes textarea").input_value() == "half a thought"
    assert me.page.locator(".rank-submit").is_disabled()


def test_a_draft_does_not_reach_the_next_item(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    me = visit(site(("p", ["x", "y"]), ("q", ["v", "w"])))
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.progress("1 ranked")
    assert me.rows()["pool"] == ["A", "B"]


def test_a_lost_answer_is_asked_for_again_and_saved_once(
    site: Callable[..., Site], visit: Callable[..., Visit]
) -> None:
    where = site(("p", ["x", "y"]))
    me = visit(where)
    calls = []

    def lose_the_first_answer(route: Any) -> None:
        calls.append(route.request.post_data_json["key"])
        if len(calls) == 1:
            route.fetch()  # the server saves it
            route.abort()
        else:
            route.continue_()

    me.page.route("**/api/v1/submit", lose_the_first_answer)
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.progress("1 ranked · 0 to go")
    assert len(calls) == 2
    assert len(set(calls)) == 1
    assert where.rankings_ever_saved() == 1


def test_saved_is_said_only_when_it_is(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    where = site(("p", ["x", "y"]))
    me = visit(where)
    me.page.route("**/api/v1/submit", lambda route: route.abort())
    me.put("A", 1)
    me.put("B", 2)
    me.page.locator(".rank-submit").click()
    me.shows("Not saved")
    assert me.rows()["0"] == ["A"]
    assert where.rankings_ever_saved() == 0
    me.page.unroute("**/api/v1/submit")
    me.submit()
    me.progress("1 ranked · 0 to go")
    assert where.rankings_ever_saved() == 1


def test_skip_and_undo(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    where = site(("p", ["x", "y"]), ("q", ["v", "w"]))
    me = visit(where)
    first = me.texts()
    me.put("A", 2)
    me.put("B", 1)
    me.submit()
    me.progress("1 ranked · 1 to go")
    me.page.get_by_role("button", name="Skip").click()
    me.progress("1 ranked · 0 to go · 1 skipped")
    me.page.get_by_role("button", name="Undo").click()
    me.progress("1 ranked · 1 to go")
    me.page.get_by_role("button", name="Undo").click()
    me.progress("0 ranked · 2 to go")
    assert me.texts() == first
    assert me.rows() == {"pool": [], "0": ["B"], "1": ["A"], "aside": []}
    assert where.store.rankings() == []
    me.put("A", 1)
    me.submit()
    me.progress("1 ranked · 1 to go")
    assert ranks_by_text(where.store.rankings()[0]) == {first["A"]: 1, first["B"]: 1}


def test_a_phone_ranks_by_touch_without_scrolling_sideways(
    site: Callable[..., Site], visit: Callable[..., Visit]
) -> None:
    long = "averyveryverylongword" * 12
    where = site((f"A prompt with {long}", [f"{n} {long} `{long}`" for n in range(9)]))
    me = visit(where, 390, 844, has_touch=True, is_mobile=True)
    assert me.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for number, letter in enumerate("ABCDEFGHI"):
        me.page.get_by_role("button", name=f"Rank {letter} {number + 1}", exact=True).tap()
    me.page.locator(".rank-submit").tap()
    me.progress("1 ranked · 0 to go")
    ranking = where.store.rankings()[0]
    assert [ranking.ranks[index] for index in ranking.presented_order or ()] == list(range(1, 10))


def test_texts_can_be_read_as_written(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    house = " /\\\n/  \\ `x` *y*\n~~~\n| <b> |  ${z}"
    me = visit(site(("# p", [house, "![a](b)"])))
    letter = next(letter for letter, text in me.texts().items() if "${z}" in text)
    me.put(letter, 1)
    me.page.get_by_label("Show texts as written").check()
    me.page.locator("#prompt pre").wait_for()
    assert me.page.locator(f"#card-{letter} pre").inner_text().rstrip("\n") == house
    assert me.rows()["0"] == [letter]
    assert "# p" in me.page.locator("#prompt").inner_text()


def test_guidelines_are_shown_on_demand(site: Callable[..., Site], visit: Callable[..., Visit]) -> None:
    me = visit(site(("p", ["x", "y"])))
    text = me.page.get_by_text("Rank the completions from best to worst")
    assert not text.is_visible()
    me.page.get_by_role("button", name="Guidelines").click()
    text.wait_for(state="visible")

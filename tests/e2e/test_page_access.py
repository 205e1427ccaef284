"""Phones, screen readers, first-time annotators: everybody gets through."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.types import Completion
from tests.e2e.page_shots import GUIDELINES, QUIZ
from tests.e2e.page_world import Visit, ranks_by_text
from tests.e2e.test_page import FILMS, Open, Serve

PHONE: dict[str, Any] = {"width": 390, "height": 844, "has_touch": True, "is_mobile": True}


def test_a_phone_ranks_nine_by_touch_without_scrolling_sideways(site: Serve, visit: Open) -> None:
    long = "averyveryverylongword" * 12
    where = site((f"A prompt with {long}", [f"{n} {long} `{long}` $${long}$$" for n in range(9)]))
    me = visit(where, **PHONE)
    assert not me.sideways()
    for number, letter in enumerate("ABCDEFGHI"):
        me.page.get_by_role("button", name=f"Rank {letter} {number + 1}", exact=True).tap()
    sizes = me.page.locator(":is(.picks, .actions, .top, .tools) button:visible").evaluate_all(SIZES)
    assert min(height for _, height in sizes) >= 44
    bar = me.page.locator(".submit").bounding_box()
    assert bar["y"] + bar["height"] <= 844
    me.page.locator(".submit").tap()
    me.ready("finished")
    (ranking,) = where.store.rankings()
    assert [ranking.ranks[index] for index in ranking.presented_order or ()] == list(range(1, 10))
    assert me.problems == []


SIZES = "es => es.map(e => [e.offsetWidth, e.offsetHeight])"


def drag_by_touch(me: Visit, letter: str, row: str | int) -> None:
    """A finger on a letter of the panel, moved to a row."""
    me.page.locator(".rows").evaluate("rows => rows.scrollIntoView({ block: 'center' })")
    start, end = me.chip(letter).bounding_box(), me.row(row).bounding_box()
    touch = me.page.context.new_cdp_session(me.page)

    def send(kind: str, *points: dict[str, float]) -> None:
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    send("touchStart", {"x": start["x"] + 10, "y": start["y"] + 10})
    for step in range(1, 6):
        y = start["y"] + (end["y"] + end["height"] / 2 - start["y"]) * step / 5
        send("touchMove", {"x": start["x"] + 30, "y": y})
    send("touchEnd")


def test_digits_are_typed_on_keyboards_that_write_other_signs_there(site: Serve, visit: Open) -> None:
    """French: & for 1 and - for 6; 1 with shift. Nothing is set aside or tied by mistake."""
    me = visit(site(("p", ["x", "y", "z", "u", "v", "w"])))
    for key, digit, shift in (("&", 1, False), ("-", 6, False), ("2", 2, True)):
        event = {"key": key, "code": f"Digit{digit}", "shiftKey": shift, "bubbles": True}
        me.page.evaluate("what => document.body.dispatchEvent(new KeyboardEvent('keydown', what))", event)
    rows = me.rows()
    assert (rows["0"], rows["5"], rows["1"], rows["aside"]) == (["A"], ["B"], ["C"], [])


def test_an_item_with_more_completions_than_the_page_has_room_for_is_not_ranked_unseen(
    site: Serve, visit: Open
) -> None:
    where = site(("p", ["x", "y"]))
    me = visit(where)
    where.store.add_completions("q", [Completion(text, "m", 0) for text in "xyz"])
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.ready("stopped")
    assert "This item has 3 completions" in me.page.locator("#message").inner_text()
    assert "start `rlhf label` again" in me.page.locator("#message").inner_text()


def test_a_finger_drags_letters_to_ranks(site: Serve, visit: Open) -> None:
    me = visit(site(("p", ["x", "y", "z"])), **PHONE)
    drag_by_touch(me, "B", 0)
    drag_by_touch(me, "A", 1)
    drag_by_touch(me, "C", 1)
    assert me.rows() == {"pool": [], "0": ["B"], "1": ["A", "C"], "2": [], "aside": []}


def test_a_newcomer_reads_answers_and_begins(site: Serve, visit: Open) -> None:
    where = site(("p", ["x", "y"]), guidelines=GUIDELINES, quiz=QUIZ)
    me = visit(where, screen="quiz")
    assert me.page.get_by_text("you would rather have received").is_visible()
    assert me.page.locator("#cards").is_hidden()
    assert "The beautiful one" in me.page.locator(".quiz").inner_text()
    assert "well written" not in me.page.locator(".quiz").inner_text()
    check = me.page.get_by_role("button", name="Check my answers")
    check.click()
    me.shows("Answer every question first", ".quiz .status")
    me.page.get_by_label("The beautiful one").check()
    me.page.get_by_label("Tie them").check()
    check.click()
    me.shows("Not quite. True comes before well written.", ".explained")
    me.page.reload()
    me.ready("quiz")
    me.page.get_by_label("The plain one").check()
    me.page.get_by_label("Tie them").check()
    check.click()
    me.page.get_by_role("button", name="Begin ranking").click()
    me.ready()
    assert me.page.locator("#guidelines").is_visible()  # beside the first item, once
    me.press("Escape")
    me.page.reload()
    me.ready()
    assert me.page.locator("#guidelines").is_hidden()
    me.press("1", "2", "Control+Enter")
    me.ready("finished")
    assert len(where.store.rankings()) == 1
    assert me.problems == []


def test_the_page_is_read_in_the_order_of_the_work(site: Serve, visit: Open) -> None:
    """Steps, prompt, cards, then the panel; the buttons of a card before those of the next."""
    me = visit(site(("p", ["x", "y"])))
    order = me.page.locator(".steps, #prompt, .card:visible .picks, .rows, .submit").evaluate_all(
        "es => es.map(e => e.id || e.classList[0])"
    )
    assert order == ["steps", "prompt", "picks", "picks", "rows", "main"]
    names = me.page.locator("#cards .card:visible").evaluate_all("es => es.map(e => e.getAttribute('aria-label'))")
    assert names == ["Completion A", "Completion B"]
    nameless = me.page.locator("button:visible").evaluate_all(
        "es => es.filter(e => !(e.getAttribute('aria-label') || e.innerText.trim() || e.title)).map(e => e.outerHTML)"
    )
    assert nameless == []


def test_focus_stays_and_what_happens_is_announced(site: Serve, visit: Open) -> None:
    me = visit(site(("p", ["x", "y", "z"])))
    me.put("B", 2)
    assert me.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Rank B 2"
    live = me.page.locator(".for-readers")
    assert live.inner_text() == "B: rank 2. 2 left to place"
    me.put("C", 2)
    assert live.inner_text() == "C: rank 2, tied with B. 1 left to place"
    me.page.get_by_role("button", name="Guidelines").click()
    assert me.page.evaluate("document.activeElement.textContent") == "Guidelines"
    me.press("Escape")
    assert me.page.evaluate("document.activeElement.classList.contains('to-guidelines')")


def test_dark_and_narrow_pages_can_be_read(site: Serve, visit: Open) -> None:
    """Every text stands out from what is behind it by the ratio that WCAG asks for, 4.5."""
    where = site(("p", ["x `code`", "y"]), criteria=["helpful"])
    for options in ({"color_scheme": "dark"}, {"color_scheme": "light"}):
        me = visit(where, **options)
        me.page.locator(".notes summary").click()
        low = me.page.evaluate(LOW_CONTRAST)
        assert low == []


LOW_CONTRAST = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = (v) => (v > .039 ? ((v + .055) / 1.055) ** 2.4 : v / 12.92);
  const light = (rgb) => rgb.slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0.5) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll('.top *, #desk *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.disabled || node.closest('.katex-mathml')) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.push(`${node.outerHTML.slice(0, 80)} ${((a + .05) / (b + .05)).toFixed(2)}`);
  }
  return found;
}"""


def test_ten_items_are_ranked_from_the_first_screen_alone(site: Serve, visit: Open) -> None:
    """As someone who reads what is on the screen and nothing else: the numbers on the cards, then the big button."""
    where = site(*[(f"question {n}", [f"answer {n}{letter}" for letter in "uvw"]) for n in range(10)])
    me = visit(where)
    assert "1 is best" in me.page.locator(".steps").inner_text()
    expected = []
    for done in range(1, 11):
        shown = me.written()
        for letter in me.letters():
            me.put(letter, {"u": 1, "v": 2, "w": 2}[shown[letter][-1]])
        expected.append({text: {"u": 1, "v": 2, "w": 2}[text[-1]] for text in shown.values()})
        assert me.page.locator(".submit").inner_text() == "Submit ranking"
        me.page.locator(".submit").click()
        me.progress(f"{done} ranked")
    saved = [ranks_by_text(ranking) for ranking in where.store.rankings()]
    assert all(ranks in expected for ranks in saved)
    assert len(saved) == 10
    assert me.problems == []


@pytest.mark.parametrize("lost", ["gradio_api/run", "page/rank/main.js", "assets/HTML-", "assets/index-"])
def test_a_page_of_which_something_was_lost_loads_again(site: Serve, visit: Open, lost: str) -> None:
    me = visit(site(*FILMS))
    losses: list[str] = []

    def lose(route: Any) -> None:
        if losses:
            route.continue_()
        else:
            losses.append(route.request.url)
            route.abort()

    me.page.route(f"**/{lost}**", lose)
    me.page.reload()
    me.ready()
    assert losses

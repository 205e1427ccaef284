"""Whatever a model wrote is shown as it wrote it, and does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from labeling_ui.markdown import MAX_FORMATTED
from tests.e2e.hostile import EVIL, HOSTILE
from tests.e2e.page_world import ranks_by_text
from tests.e2e.test_page import Open, Serve

IN_ONE_ITEM = 8


def hostile_items() -> list[tuple[Any, list[str]]]:
    """Every text once as a completion, and some as prompts, plain and of a conversation."""
    groups = [HOSTILE[start : start + IN_ONE_ITEM] for start in range(0, len(HOSTILE), IN_ONE_ITEM)]
    turns = [
        {"role": role, "content": text} for role, text in zip(("system", "user", "<b>x</b>"), HOSTILE, strict=False)
    ]
    prompts = [HOSTILE[0], HOSTILE[4], turns, HOSTILE[17], HOSTILE[10]]
    return list(zip(prompts, groups, strict=True))


def test_forty_hostile_texts_are_shown_to_the_letter_and_do_nothing(site: Serve, visit: Open) -> None:
    where = site(*hostile_items())
    me = visit(where)
    seen = []
    for number in range(1, len(hostile_items()) + 1):
        me.page.wait_for_function(MARKDOWN_OR_WRITTEN)
        seen += me.written().values()
        prompts = me.page.locator("#prompt .turn:not([hidden]) .written").evaluate_all(
            "es => es.map(e => e.textContent)"
        )
        assert prompts in [as_texts(prompt) for prompt, _ in hostile_items()]
        assert (
            me.page.locator("#reading :is(img, iframe, object, embed, form, script, style, base, dialog)").count() == 0
        )
        assert me.page.locator(":is(#prompt, #cards .block.model-text) :is(svg:not(button svg), a[href])").count() == 0
        assert "secret-model" not in me.page.content()
        for link in me.page.locator("#cards a:visible").all()[:3]:
            link.click()
        assert not me.sideways()
        for place, letter in enumerate(me.letters()):
            me.press(letter.lower(), str(place + 1))
        me.page.locator(".submit").click()
        me.progress(f"{number} ranked")
    assert sorted(seen) == sorted(HOSTILE)
    assert me.page.evaluate("window.pwned") is None
    assert len(me.page.context.pages) == 1
    assert me.problems == []
    saved = [text for ranking in where.store.rankings() for text in ranks_by_text(ranking)]
    assert sorted(saved) == sorted(HOSTILE)


def as_texts(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


MARKDOWN_OR_WRITTEN = """() => [...document.querySelectorAll('#cards .card:not([hidden])')].every(card =>
  card.dataset.form === 'markdown' || card.querySelector('.written').offsetHeight > 0)"""

MARKDOWN = {
    "**bold** and *it* & `a < b && c` <b>": "bold and it & a < b && c <b>",
    "1. one\n2. two\n\n```c\nif (a < b && *p) {\n\treturn &x;\n}\n```": "if (a < b && *p) {\n    return &x;\n}",
    "from $5 to $6, and $x<y$ in $$\\sum_i a_i$$": "from $5 to $6, and ",
    "def f():\n    indented\n    lines": "def f():\nindented\nlines",
}


def test_markdown_code_and_latex_are_formatted(site: Serve, visit: Open) -> None:
    where = site(("# A *prompt*", list(MARKDOWN)))
    me = visit(where)
    me.page.wait_for_function("document.querySelectorAll('.card[data-form=markdown]').length === 4")
    assert me.page.locator("#prompt h1 em").inner_text() == "prompt"
    for letter, text in me.written().items():
        assert MARKDOWN[text] in me.card(letter).locator(".prose.model-text").inner_text()
    assert me.page.locator("#cards .katex").count() == 2
    assert me.page.locator("#cards .katex-error").count() == 0
    assert "x<y" in me.page.locator("#cards .katex annotation").first.inner_html().replace("&lt;", "<")


def test_texts_can_be_read_as_written(site: Serve, visit: Open) -> None:
    house = " /\\\n/  \\ `x` *y*\n~~~\n| <b> |  ${z}\n\n"
    me = visit(site(("# p", [house, "![a](b)"])))
    letter = next(letter for letter, text in me.written().items() if "${z}" in text)
    me.put(letter, 1)
    assert me.card(letter).locator(".written").is_hidden()
    me.page.get_by_role("button", name="As written").click()
    assert me.card(letter).locator(".written").inner_text() == house
    assert me.card(letter).locator(".prose.model-text").is_hidden()
    assert me.page.locator("#prompt .written").inner_text() == "# p"
    assert me.rows()["0"] == [letter]


def test_a_card_never_shows_the_text_of_the_item_before(site: Serve, visit: Open) -> None:
    """Were the Markdown of a text to fail, Gradio would leave the old one standing; here the page breaks it by hand."""
    where = site(("p", ["old x", "old y"]), ("q", ["new v", "new w"]))
    me = visit(where)
    me.page.wait_for_function("document.querySelectorAll('.card[data-form=markdown]').length === 2")
    before = set(me.written().values())

    def lose_the_markdown(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        body["data"] = [each if not isinstance(each, str) else {"__type__": "update"} for each in body["data"]]
        route.fulfill(response=answer, json=body)

    me.page.route("**/gradio_api/run/predict*", lose_the_markdown)
    me.press("1", "2", "Control+Enter")
    me.progress("1 ranked")
    after = set(me.written().values())
    assert after.isdisjoint(before)
    shown = [me.card(letter).locator(".written, .prose.model-text").evaluate_all(VISIBLE) for letter in "AB"]
    assert {text for texts in shown for text in texts} == after


VISIBLE = "es => es.filter(e => e.offsetHeight > 0).map(e => e.innerText.trim())"


def test_two_cards_are_compared_word_by_word(site: Serve, visit: Open) -> None:
    texts = [
        "The cat sat on the mat, <b>today</b>.",
        "The dog sat on the mat, <b>today</b>.",
        "x" * (MAX_FORMATTED + 5),
    ]
    me = visit(site(("p", texts)))
    at = {text: letter for letter, text in me.written().items()}
    me.press(at[texts[0]].lower(), "Shift+C")
    dialog = me.page.get_by_role("dialog", name="Compare")
    me.press(at[texts[1]].lower())
    me.page.wait_for_function(
        "[...document.querySelectorAll('.compare mark')].map(e => e.textContent).join() === 'cat ,dog '"
    )
    halves = dialog.locator(".words").all_inner_texts()
    assert halves == [texts[0], texts[1]]
    me.press(at[texts[2]].lower())
    dialog.get_by_text("Only the first 20000 characters are compared.").wait_for()
    me.press("Escape")
    assert me.rows()["pool"] == ["A", "B", "C"]
    assert me.problems == []


def test_long_cards_open_and_close_one_by_one_and_all_together(site: Serve, visit: Open) -> None:
    long = "\n\n".join(f"line {n}" for n in range(80))
    me = visit(site(("p", [long, "short", long + "!"])))
    me.page.wait_for_function("document.querySelectorAll('.card.long').length === 2")
    first_long = me.letters()[0] if me.written()["A"] != "short" else "B"

    def heights() -> list[int]:
        return me.page.locator(".card.long").evaluate_all("cards => cards.map(card => card.offsetHeight)")

    closed = heights()
    assert max(closed) < 700
    me.card(first_long).get_by_role("button", name="Show all of it").click()
    assert heights()[0] > 2000
    assert heights()[1] == closed[1]
    me.press("Shift+X")
    assert min(heights()) > 2000
    me.press("Shift+X")
    assert heights() == closed


@pytest.mark.parametrize("width", [1280, 390])
def test_right_to_left_texts_run_from_the_right(site: Serve, visit: Open, width: int) -> None:
    arabic, latin = "السماء زرقاء لأن الهواء يبعثر الضوء.", "The sky is blue."
    me = visit(site((arabic, [arabic, latin])), width)
    me.page.wait_for_function("document.querySelectorAll('.card[data-form=markdown]').length === 2")
    at = {text: letter for letter, text in me.written().items()}
    direction = "e => getComputedStyle(e).direction"
    assert me.card(at[arabic]).locator(".md p:visible").evaluate(direction) == "rtl"
    assert me.card(at[latin]).locator(".md p:visible").evaluate(direction) == "ltr"
    assert me.card(at[arabic]).locator(".written").evaluate(direction) == "rtl"
    assert not me.sideways()


def test_no_link_of_a_text_leads_away(site: Serve, visit: Open) -> None:
    me = visit(site(("p", [f"[a link]({EVIL}/?a=1&b=2)", "x"])))
    link = me.page.get_by_text("a link", exact=True)
    link.wait_for()
    assert link.get_attribute("href") is None
    assert link.get_attribute("title") == f"{EVIL}/?a=1&b=2"
    link.click(modifiers=["Control"])
    assert len(me.page.context.pages) == 1
    assert me.problems == []

"""Pictures of every screen of the ranking page, wide and narrow: `python -m tests.e2e.page_shots OUT`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.conftest import CHROMIUM, QUIET_CHROMIUM
from tests.e2e.page_world import Items, Visit, opened, running

LIGHTHOUSE = [
    "A lighthouse keeper's day begins before dawn.\n\n1. **Trim the wick** and polish the lens.\n2. Log the weather.\n"
    "3. Wind the clockwork: it turns the lamp once in $t = 2\\pi\\sqrt{\\ell / g}$ seconds.\n\n"
    "Most of it is waiting; the rest is being exactly on time.",
    "Keepers got up, lit the lamp, and went back to bed. Nothing much happened, which was the point.",
    "A lighthouse keeper's day begins at dusk.\n\n1. **Trim the wick** and clean the lens.\n2. Write the log.\n\n"
    "Most of it is waiting; the rest is being on time.",
    "```python\ndef keep(lamp, hours):\n    for hour in hours:\n        if lamp.is_dark() and hour < 6:\n"
    "            lamp.light()\n        yield hour\n```\n\nThat is the whole job, roughly.",
]
CHAT = [
    {"role": "system", "content": "You are a patient guide to the sea."},
    {"role": "user", "content": "How did lighthouses work before electricity?"},
    {"role": "assistant", "content": "With oil lamps, and lenses that gathered their light."},
    {"role": "user", "content": "And what did a keeper do all day?"},
]
ARABIC = "اشرح لطفل في العاشرة لماذا السماء زرقاء."
ANSWERS = [
    "لأن الهواء يبعثر الضوء الأزرق أكثر من الأحمر، فيصل إلى أعيننا من كل اتجاه.",
    "السماء زرقاء لأنها تعكس لون البحر.",
]
LONG = "\n\n".join(
    f"Paragraph {n}. The fog signal sounds every thirty seconds, and each blast is logged." for n in range(40)
)
ITEMS: Items = [(CHAT, LIGHTHOUSE), ("Describe a foggy night.", [LONG, "Grey, wet and loud."]), (ARABIC, ANSWERS)]

GUIDELINES = """Prefer the completion that **you would rather have received**.

1. *True* comes before *well written*: a false statement costs a rank.
2. A short answer that answers is better than a long one that does not.
3. Where two are equally good, tie them. Do not look for differences that do not matter.

Set a card aside if you cannot judge it, for example because it is in a language that you do not read."""

QUIZ = """
- question: One completion is beautiful but says that lamps were electric in 1700. The other is plain and true. Which?
  options: ["The beautiful one", "The plain one", "They tie"]
  answer: "The plain one"
  explanation: "True comes before well written."
- question: Two completions are equally good, and differ in one comma. What do you do?
  options: ["Rank the first one higher", "Tie them", "Set both aside"]
  answer: "Tie them"
  explanation: "Do not look for differences that do not matter."
"""
SEED = 14
"""With it the items come in the order above."""
SIZES: dict[str, dict[str, Any]] = {
    "1280": {"width": 1280, "height": 860},
    "390": {"width": 390, "height": 844, "has_touch": True, "is_mobile": True},
}


def ranking(me: Visit) -> None:
    me.put("A", 2)
    me.put("B", 4)


def ties(me: Visit) -> None:
    me.put("C", 2)
    me.put("D", 1)
    me.card("A").get_by_role("button", name="A: helpful 4 of 5").click()
    me.draft_saved()


def help_(me: Visit) -> None:
    me.press("?")


def diff(me: Visit) -> None:
    me.press("Escape", "Shift+C", "d")
    me.page.locator("dialog.compare mark").first.wait_for()


def guidelines(me: Visit) -> None:
    me.press("Escape")
    me.page.get_by_role("button", name="Guidelines").click()


def trouble(me: Visit) -> None:
    me.press("Escape")
    me.page.route("**/api/v1/submit", lambda route: route.fulfill(status=401, json={"error": "log in"}))
    me.page.locator(".submit").click()
    me.page.locator(".trouble").wait_for()


def long_card(me: Visit) -> None:
    me.page.unroute("**/api/v1/submit")
    me.page.get_by_role("button", name="Try again").click()
    me.progress("1 ranked")
    me.page.locator(".card.long").first.wait_for()


def right_to_left(me: Visit) -> None:
    me.put("A", 1)
    me.put("B", 2)
    me.submit()
    me.progress("2 ranked")


def recent(me: Visit) -> None:
    me.put("A", 2)
    me.put("B", 1)
    me.page.get_by_role("button", name="Recent").click()
    me.page.locator(".recent li button").first.wait_for()


def finished(me: Visit) -> None:
    me.press("Escape")
    me.submit()
    me.ready("finished")


WALK: list[Callable[[Visit], None]] = [
    *(ranking, ties, help_, diff, guidelines, trouble, long_card, right_to_left, recent, finished)
]


def main(out: Path) -> None:
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    site: dict[str, Any] = {"criteria": ["helpful"], "guidelines": GUIDELINES, "quiz": QUIZ, "seed": SEED}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET_CHROMIUM)
        for width, size in SIZES.items():
            for scheme, walk in (("light", WALK), ("dark", WALK[: WALK.index(diff) + 1])):
                with tempfile.TemporaryDirectory() as folder, running(Path(folder), ITEMS, **site) as where:
                    _walk(opened(browser, where.url, **size, color_scheme=scheme), walk, out, f"{width}-{scheme}")
        browser.close()


def _walk(me: Visit, walk: list[Callable[[Visit], None]], out: Path, name: str) -> None:
    me.ready("quiz")
    _answer(me, "The beautiful one")
    _shot(me, out / f"quiz-{name}.png")
    _answer(me, "The plain one")
    me.page.get_by_role("button", name="Begin ranking").click()
    me.ready()
    me.press("Escape")
    for step in walk:
        step(me)
        _shot(me, out / f"{step.__name__.rstrip('_')}-{name}.png")
    assert me.problems == [], me.problems
    me.page.context.close()


def _answer(me: Visit, first: str) -> None:
    me.page.get_by_label(first).check()
    me.page.get_by_label("Tie them").check()
    me.page.get_by_role("button", name="Check my answers").click()
    me.page.locator("fieldset[data-right]").first.wait_for()


def _shot(me: Visit, path: Path) -> None:
    from PIL import Image

    me.page.wait_for_timeout(400)
    me.page.evaluate("scrollTo(0, 0)")
    me.page.screenshot(path=path)
    with Image.open(path) as shot:
        small = shot.convert("RGB").quantize(96)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A ranking page that runs, and people who visit it in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from labeling_ui import app
from labeling_ui.auth import Accounts
from labeling_ui.guidelines import publish
from labeling_ui.places import Policy
from labeling_ui.service import LabelService
from rlhf import schema
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import Completion, Ranking
from tests.e2e.serving import serving

Items = Sequence[tuple[Any, Sequence[str]]]


@dataclass
class Site:
    """A running page over a store of its own."""

    url: str
    store: Store
    service: LabelService

    def rankings_ever_saved(self) -> int:
        with self.store.read() as connection:
            return connection.scalars(sa.select(sa.func.count()).select_from(schema.rankings)).one()

    def drafts(self) -> list[dict[str, Any]]:
        with self.store.read() as connection:
            return list(connection.scalars(sa.select(schema.drafts.c.body)))


@contextmanager
def running(
    folder: Path,
    items: Items,
    *,
    criteria: Sequence[str] = (),
    guidelines: str | None = None,
    quiz: str | None = None,
    accounts: bool = False,
    seed: int = 0,
) -> Iterator[Site]:
    """Serve these items (a prompt and its completions) from a new store in `folder`; YAML in `quiz`.

    The seed decides in which order `me` gets the items, and sees the completions.
    """
    config = LabelConfig(store=str(folder / "labels.db"), annotator="me", criteria=list(criteria), accounts=accounts)
    store = Store(folder / "labels.db")
    for prompt, texts in items:
        store.add_completions(prompt, [Completion(text, "secret-model", n) for n, text in enumerate(texts)])
    publish(store, 1, _file(folder / "guidelines.md", guidelines), _file(folder / "quiz.yaml", quiz))
    service = LabelService(store, Policy(seed=seed), criteria=criteria)
    slots = max(len(texts) for _, texts in items)
    served = app.create(service, config, Accounts(store) if accounts else None, slots=slots)
    with serving(served) as url:
        yield Site(url, store, service)
    store.close()


def _file(path: Path, text: str | None) -> str | None:
    if text is None:
        return None
    path.write_text(text, encoding="utf-8")
    return str(path)


@dataclass
class Visit:
    """A person at the page. `problems` lists errors of the page, its dialogs, and requests to other sites."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)

    def ready(self, screen: str = "rank") -> Visit:
        self.page.wait_for_selector(f'body[data-screen="{screen}"]')
        self.page.wait_for_function(
            "document.body.dataset.screen !== 'rank' || document.querySelectorAll('.rows .rank-row').length > 2"
        )
        return self

    def letters(self) -> list[str]:
        return self.page.locator("#cards .card:visible .card-letter").all_inner_texts()

    def card(self, letter: str) -> Any:
        return self.page.get_by_role("group", name=f"Completion {letter}", exact=True)

    def written(self) -> dict[str, str]:
        """The exact text of each card, by letter."""
        return {
            letter: self.card(letter).locator(".written").evaluate("e => e.textContent") for letter in self.letters()
        }

    def rows(self) -> dict[str, list[str]]:
        """The letters in each row of the panel."""
        letters = "row => [row.dataset.row, [...row.querySelectorAll('.chip')].map(chip => chip.innerText)]"
        return self.page.locator(".rows .rank-row").evaluate_all(f"rows => Object.fromEntries(rows.map({letters}))")

    def put(self, letter: str, rank: int) -> None:
        self.page.get_by_role("button", name=f"Rank {letter} {rank}", exact=True).click()

    def chip(self, letter: str) -> Any:
        return self.page.locator(".chip", has_text=letter)

    def row(self, name: str | int) -> Any:
        return self.page.locator(f'.rank-row[data-row="{name}"]')

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def drag(self, what: Any, row: str | int) -> None:
        start, end = what.bounding_box(), self.row(row).bounding_box()
        self.page.mouse.move(start["x"] + 10, start["y"] + 10)
        self.page.mouse.down()
        self.page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=6)
        self.page.mouse.up()

    def submit(self) -> None:
        self.page.locator(".submit").click()
        self.shows("Saved")

    def shows(self, text: str, where: str = ".status") -> None:
        found = "([where, text]) => [...document.querySelectorAll(where)].some(e => e.textContent.startsWith(text))"
        self.page.wait_for_function(found, arg=[where, text])

    def progress(self, text: str) -> None:
        self.shows(text, ".progress-text")

    def draft_saved(self) -> None:
        self.shows("Draft saved", ".draft-status")

    def sideways(self) -> bool:
        """Whether the page scrolls to the side."""
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def opened(browser: Any, url: str, width: int = 1280, height: int = 900, **options: Any) -> Visit:
    """A new browser context at the page, which is not waited for."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    return another_tab(context, url)


def another_tab(context: Any, url: str) -> Visit:
    visit = Visit(context.new_page(), url)
    visit.page.set_default_timeout(60_000)
    visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
    visit.page.on("dialog", lambda dialog: (visit.problems.append(dialog.message), dialog.accept()))
    visit.page.on("request", _note_strangers(visit, url))
    visit.page.goto(url)
    return visit


def _note_strangers(visit: Visit, url: str) -> Callable[[Any], None]:
    def note(request: Any) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            visit.problems.append(request.url)

    return note


def ranks_by_text(ranking: Ranking) -> dict[str, int | None]:
    return dict(zip(ranking.completions, ranking.ranks, strict=True))

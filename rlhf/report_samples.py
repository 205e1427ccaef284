"""Texts of a report to read side by side, with pages, an order and filters. Model text is hostile: all is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.figures import short, text
from rlhf.report_data import Cell, Samples

MOST_SAMPLES = 1000
MOST_CHOICES = 8
LONGEST_CHOICE = 24
NOTHING = "-"


@dataclass(frozen=True)
class _Columns:
    """What each column is for, by its place."""

    names: tuple[str, ...]
    prompts: tuple[int, ...]
    texts: tuple[int, ...]
    choices: tuple[int, ...]
    """Columns of a few words, such as who won: a reader filters by them."""
    numbers: tuple[int, ...]

    def of_side(self, side: int) -> list[int]:
        """The numbers that belong to one text: `policy score` to `policy`."""
        return [i for i in self.numbers if self.names[i].startswith(f"{self.names[side]} ")]

    def of_all(self) -> list[int]:
        """The other numbers."""
        taken = {i for side in self.texts for i in self.of_side(side)}
        return [i for i in self.numbers if i not in taken]


def samples_block(samples: Samples | None) -> str:
    """Texts side by side, five at a time, with filters and an order; without scripts, all of them."""
    if samples is None or not samples.rows:
        return ""
    rows = samples.rows[:MOST_SAMPLES]
    columns = _columns(samples.columns, rows)
    cards = "".join(_card(columns, row) for row in rows)
    left_out = len(samples.rows) - len(rows)
    note = f"<small>{left_out:,} more are in samples.jsonl.</small>" if left_out else ""
    return (
        f'<div class="samples"><div class="tools" hidden>{_tools(columns, rows)}</div>'
        f'<div class="list">{cards}</div>{note}</div>'
    )


def cell(value: Cell) -> str:
    """A number at reading precision, a text as it is, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value) if isinstance(value, float) else text(value)


def is_numeric(column: Sequence[Cell]) -> bool:
    """Whether a column holds numbers, and gaps at most."""
    found = [value for value in column if value is not None]
    return bool(found) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)


def _columns(names: Sequence[str], rows: Sequence[tuple[Cell, ...]]) -> _Columns:
    by_place = dict(enumerate(zip(*rows, strict=True)))
    numbers = [i for i, column in by_place.items() if is_numeric(column)]
    prompts = [i for i in by_place if i not in numbers and names[i].lower() == "prompt"]
    others = [i for i in by_place if i not in numbers and i not in prompts]
    choices = [i for i in others if _is_choice(by_place[i])]
    texts = [i for i in others if i not in choices]
    return _Columns(tuple(names), tuple(prompts), tuple(texts), tuple(choices), tuple(numbers))


def _is_choice(column: Sequence[Cell]) -> bool:
    found = {cell(value) for value in column}
    if all(isinstance(value, bool) or value is None for value in column):
        return True
    few = 2 <= len(found) <= MOST_CHOICES and 2 * len(found) <= len(column)
    return few and all(len(word) <= LONGEST_CHOICE and "\n" not in word for word in found)


def _tools(columns: _Columns, rows: Sequence[tuple[Cell, ...]]) -> str:
    orders = "".join(
        f'<option value="{place} {sign}">{text(columns.names[i])}, {word} first</option>'
        for place, i in enumerate(columns.numbers)
        for sign, word in ((-1, "highest"), (1, "lowest"))
    )
    filters = "".join(
        f'<select class="filter" aria-label="{text(columns.names[i])}"><option value="">any {text(columns.names[i])}'
        "</option>"
        + "".join(f'<option value="{word}">{word}</option>' for word in sorted({cell(row[i]) for row in rows}))
        + "</select>"
        for i in columns.choices
    )
    return (
        '<input type="search" placeholder="contains…" aria-label="Show samples that contain">'
        f'{filters}<select class="order" aria-label="Order"><option value="0 0">as drawn</option>{orders}</select>'
        '<button type="button">Back</button><button type="button">Next</button>'
        '<span class="soft" role="status"></span>'
    )


def _card(columns: _Columns, row: Sequence[Cell]) -> str:
    """One prompt with its completions beside each other; each number stands with the text it belongs to."""
    names = columns.names
    chips = "".join(_chip(names[i], row[i]) for i in (*columns.choices, *columns.of_all()))
    sides = "".join(
        _words(names[i], row[i], "words", [(names[n].removeprefix(names[i]), row[n]) for n in columns.of_side(i)])
        for i in columns.texts
    )
    numbers = " ".join("NaN" if row[i] is None else f"{float(row[i] or 0):.6g}" for i in columns.numbers)
    choices = "\n".join(cell(row[i]) for i in columns.choices)
    return (
        f'<article class="sample" data-numbers="{numbers}" data-choices="{choices}">'
        + (f'<div class="chips">{chips}</div>' if chips else "")
        + "".join(_words(names[i], row[i], "words prompt") for i in columns.prompts)
        + f'<div class="sides">{sides}</div></article>'
    )


def _chip(name: str, value: Cell) -> str:
    return f'<span><span class="soft">{text(name.strip())}</span> {cell(value)}</span>'


def _words(name: str, value: Cell, style: str, numbers: Sequence[tuple[str, Cell]] = ()) -> str:
    chips = "".join(_chip(*number) for number in numbers)
    return (
        f'<div><h4>{text(name)}<span class="chips">{chips}</span></h4>'
        f'<div class="{style}" dir="auto">{cell(value)}</div></div>'
    )

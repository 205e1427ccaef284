"""Parts of the admin page: tables, tiles and sentences as HTML. Every text goes through `text`, which escapes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from labeling_ui.intervals import Rate
from rlhf.figures import text
from rlhf.types import Prompt

LONG = 24
"""Characters from which on a cell is given room to breathe."""
START = 90
"""Characters of a prompt in a list."""


@dataclass(frozen=True)
class Counted:
    """A rate, and of what it is one."""

    rate: Rate
    unit: str


@dataclass(frozen=True)
class Opens:
    """The number of an item that opens it."""

    item_id: int


Cell = str | int | float | Rate | Counted | Opens | None


def notice(message: str, *, good: bool = True) -> str:
    """One sentence on what has happened."""
    return f'<p class="notice {"good" if good else "bad"}" role="status">{text(message)}</p>' if message else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, none: str = "") -> str:
    """A table that scrolls within itself; rates carry their intervals and counts."""
    rows = list(rows)
    if not rows:
        return empty(none)
    kinds = ["" if isinstance(each, str | Opens | None) else ' class="number"' for each in rows[0]]
    head = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def start(prompt: Prompt) -> str:
    """How a prompt begins; of a conversation the last turn."""
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    short = " ".join(said[: 4 * START].split())
    return short if len(short) <= START else f"{short[: START - 1]}…"


def _cell(value: Cell) -> str:
    if isinstance(value, Rate | Counted):
        counted = value if isinstance(value, Counted) else Counted(value, "")
        return f'<td class="number">{_rate(counted.rate, counted.unit)}</td>'
    if isinstance(value, Opens):
        return f'<td><button type="button" data-item="{value.item_id}">#{value.item_id}</button></td>'
    if isinstance(value, int | float):
        return (
            f'<td class="number">{value:,.2f}</td>'
            if isinstance(value, float)
            else f'<td class="number">{value:,}</td>'
        )
    kind = ' class="long"' if len(value or "") > LONG else ""
    return f'<td dir="auto"{kind}>{text(value or "")}</td>'


def _rate(rate: Rate, unit: str) -> str:
    counted = f"{rate.pairs:,} {text(unit)}".strip()
    if rate.value is None or rate.low is None or rate.high is None:
        return f"- <small>of {counted}</small>"
    decimals = 1 if max(abs(rate.value), abs(rate.high)) >= 10 else 2
    value, low, high = (f"{each:.{decimals}f}" for each in (rate.value, rate.low, rate.high))
    return f"<b>{value}</b> <small>{low} to {high}</small> <small>of {counted}</small>"


def tiles(numbers: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd><small>{text(note)}</small></div>"
        for name, value, note in numbers
    )
    return f'<dl class="tiles">{cells}</dl>'


def duration(minutes: float | None) -> str:
    if minutes is None:
        return "-"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def section(title: str, body: str) -> str:
    return f"<section><h3>{text(title)}</h3>{body}</section>"


def empty(message: str) -> str:
    return f'<p class="empty">{text(message)}</p>' if message else ""

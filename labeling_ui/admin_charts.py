"""Charts of the admin page as SVG text that takes its colours from the page. Names in it are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from labeling_ui.intervals import Rate
from rlhf.figures import short, text, ticks

WIDTH, NAMES, RIGHT = 420, 132, 14
ROW, TOP, BOTTOM = 22, 8, 34
LONGEST = 20
"""Characters of a name; the rest shows on hover."""
BINS = 16


@dataclass(frozen=True)
class Whisker:
    """One row of a forest plot. `quiet`: somebody else's number, to compare with."""

    name: str
    value: float
    low: float
    high: float
    quiet: bool = False
    note: str = ""


def whiskers(rates: Sequence[tuple[str, Rate]]) -> list[Whisker]:
    """Those of the rates that have a value."""
    return [
        Whisker(name, rate.value, rate.low, rate.high)
        for name, rate in rates
        if rate.value is not None and rate.low is not None and rate.high is not None
    ]


def forest(
    title: str,
    rows: Sequence[Whisker],
    *,
    label: str,
    reference: float | None = None,
    note: str = "",
    least: float = 0.0,
) -> str:
    """Values with 95 % intervals, one row each. `reference` is a line to read them against; empty without rows.

    The axis is as wide as the numbers need, and at least `least`.
    """
    if not rows:
        return ""
    ends = _ends([value for row in rows for value in (row.low, row.high)], reference, least)
    height = TOP + ROW * len(rows) + BOTTOM
    bottom = height - BOTTOM
    drawing = [
        f'<line class="grid" x1="{_x(tick, ends)}" x2="{_x(tick, ends)}" y1="{TOP}" y2="{bottom}"/>'
        f'<text class="middle" x="{_x(tick, ends)}" y="{bottom + 15}">{short(tick)}</text>'
        for tick in ticks(*ends)
    ]
    if reference is not None:
        at = _x(reference, ends)
        drawing.append(f'<line class="reference" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
    drawing += [_row(row, TOP + ROW * (number + 0.5), ends) for number, row in enumerate(rows)]
    drawing.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{height - 4}">{text(label)}</text>')
    spoken = "; ".join(f"{row.name}: {short(row.value)}, {short(row.low)} to {short(row.high)}" for row in rows)
    return _figure(title, drawing, height, spoken, note)


def histogram(title: str, values: Sequence[float], *, label: str, note: str = "") -> str:
    """How many of the values lie where; the highest twentieth is gathered at the right edge. Empty without values."""
    if not values:
        return ""
    top = max(float(np.quantile(values, 0.95)), 1e-9)
    counts, edges = np.histogram(np.minimum(values, top), bins=BINS, range=(0.0, top))
    named = [f"{short(low)} to {short(high)}" for low, high in pairwise(edges.tolist())]
    marks = [(tick / top, short(tick)) for tick in ticks(0.0, top)]
    return _bars(title, list(zip(named, counts.tolist(), strict=True)), marks, label, note)


def bars(title: str, counts: Sequence[tuple[str, int]], *, label: str, note: str = "") -> str:
    """A bar for each named count; the first and the last name are written below. Empty without counts."""
    if not counts:
        return ""
    marks = [((place + 0.5) / len(counts), counts[place][0]) for place in sorted({0, len(counts) - 1})]
    return _bars(title, counts, marks, label, note)


def _bars(
    title: str, counts: Sequence[tuple[str, int]], marks: Sequence[tuple[float, str]], label: str, note: str
) -> str:
    """`marks` are written below the axis, at shares of its length."""
    height, left, floor = 190, 40, 190 - BOTTOM
    most = max(1, *(count for _, count in counts))
    room, step = floor - TOP, (WIDTH - left - RIGHT) / len(counts)
    wide = min(0.9 * step, 48)
    drawing = []
    for tick in ticks(0, most, most=4, whole=True):
        y = f"{floor - room * tick / most:.1f}"
        drawing.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        drawing.append(f'<text class="end" x="{left - 6}" y="{y}" dy="4">{short(tick)}</text>')
    for number, (name, count) in enumerate(counts):
        size, x = room * count / most, left + (number + 0.5) * step - wide / 2
        drawing.append(
            f'<rect class="bar" x="{x:.1f}" y="{floor - size:.1f}" width="{wide:.1f}" height="{size:.1f}">'
            f"<title>{text(name)}: {count:,}</title></rect>"
        )
    for share, name in marks:
        x = left + (WIDTH - left - RIGHT) * share
        drawing.append(f'<text class="middle" x="{x:.1f}" y="{floor + 15}">{text(name)}</text>')
    drawing.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{height - 4}">{text(label)}</text>')
    return _figure(title, drawing, height, "; ".join(f"{name}: {count}" for name, count in counts), note)


def _row(row: Whisker, y: float, ends: tuple[float, float]) -> str:
    kind = "quiet" if row.quiet else "s1"
    low, high = _x(row.low, ends), _x(row.high, ends)
    name = row.name if len(row.name) <= LONGEST else f"{row.name[: LONGEST - 1]}…"
    hint = f"{row.name}: {short(row.value)} ({short(row.low)} to {short(row.high)}) {row.note}".strip()
    return (
        f'<g><title>{text(hint)}</title><rect class="hit" x="0" y="{y - ROW / 2:.1f}" width="{WIDTH}" height="{ROW}"/>'
        f'<text class="name {kind}" x="0" y="{y:.1f}" dy="4">{text(name)}</text>'
        f'<line class="{kind}" x1="{low}" x2="{high}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle class="{kind}" cx="{_x(row.value, ends)}" cy="{y:.1f}" r="4"/></g>'
    )


def _ends(values: Sequence[float], reference: float | None, least: float) -> tuple[float, float]:
    shown = [*values, *([] if reference is None else [reference])]
    low, high = min(shown), max(shown)
    extra = max(0.05 * (high - low), (least - (high - low)) / 2, 1e-6)
    return low - extra, high + extra


def _x(value: float, ends: tuple[float, float]) -> str:
    return f"{NAMES + (WIDTH - NAMES - RIGHT) * (value - ends[0]) / (ends[1] - ends[0]):.1f}"


def _figure(title: str, drawing: Sequence[str], height: float, spoken: str, note: str) -> str:
    small = f"<small>{text(note)}</small>" if note else ""
    return (
        f'<figure><figcaption><b>{text(title)}</b></figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{text(f"{title}. {spoken}")}">{"".join(drawing)}</svg>{small}</figure>'
    )

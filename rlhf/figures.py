"""Charts as SVG text that takes its colours from the page, so that one picture suits light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from rlhf.report_data import Fact, Line

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 34
MOST_POINTS = 300
COLOURS = 6

Range = tuple[float, float]
Point = tuple[float, float]


def text(value: object) -> str:
    """Any value as harmless HTML text; control characters become visible signs."""
    signs = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return html.escape(str(value).replace("\r\n", "\n").translate(signs | {0x7F: 0x2421}))


def chart(
    title: str, x_label: str, lines: Sequence[Line], *, y_label: str = "", note: str = "", source: str = ""
) -> str:
    """A figure with axes, legend (of two lines or more) and the value of each point on hover.

    `source` names the metric in small print. Points whose x or y is None are gaps.
    """
    lines = [_thinned(line) for line in lines if _points(line)]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in _points(line)]
    ys = [y for line in lines for y in (*(y for _, y in _points(line)), *line.low, *line.high)]
    x_range, y_range = _padded(xs, share=0.02 if lines[0].joined else 0.06), _padded(ys, share=0.08)
    drawing = [*_axes(x_range, y_range, whole=all(float(x).is_integer() for x in xs), x_label=x_label, y_label=y_label)]
    for number, line in enumerate(lines):
        drawing += _series(line, number % COLOURS + 1, x_range, y_range)
    return (
        f"<figure><figcaption><b>{text(title)}</b>{_change(lines)}</figcaption>{_legend(lines)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(_spoken(title, lines))}">'
        f"{''.join(drawing)}</svg>{_small_print(source, note)}</figure>"
    )


def interval(fact: Fact) -> str:
    """A whisker for a fact's interval, with a mark where "no difference" would be. Empty where either is missing."""
    if fact.low is None or fact.high is None or fact.reference is None or not isinstance(fact.value, int | float):
        return ""
    whole = (0.0, 1.0) if fact.low >= 0 and fact.high <= 1 and fact.reference == 0.5 else None
    ends = whole or _padded([fact.low, fact.high, fact.reference], share=0.1)

    def at(value: float) -> str:
        return f"{4 + 152 * (value - ends[0]) / (ends[1] - ends[0]):.1f}"

    caps = "".join(f'<line class="s1" x1="{at(x)}" x2="{at(x)}" y1="5" y2="13"/>' for x in (fact.low, fact.high))
    return (
        '<svg class="whisker" viewBox="0 0 160 18" aria-hidden="true">'
        f'<line class="grid" x1="4" x2="156" y1="9" y2="9"/>'
        f'<line class="reference" x1="{at(fact.reference)}" x2="{at(fact.reference)}" y1="1" y2="17"/>'
        f'<line class="s1" x1="{at(fact.low)}" x2="{at(fact.high)}" y1="9" y2="9"/>{caps}'
        f'<circle class="s1" cx="{at(fact.value)}" cy="9" r="2.5"/></svg>'
    )


def short(value: float) -> str:
    """A number at reading precision: 12,000 / 0.613 / 3.1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


def aligned(values: Sequence[float], decimals: int | None = None) -> list[str]:
    """Numbers of one column with the same count of decimals: that of the most precise, where none is given."""
    shown = [short(value) for value in values]
    if decimals is None:
        if any("e" in number for number in shown):
            return shown
        decimals = max((len(number.partition(".")[2]) for number in shown), default=0)
    return [f"{value:,.{decimals}f}" for value in values]


def ticks(low: float, high: float, *, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (max(factor * power, 1.0 if whole else 0.0) for factor in (1, 2, 5, 10, 20))
    places = ((step, math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)) for step in steps)
    step, first, last = next(place for place in places if place[2] - place[1] < most)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _points(line: Line) -> list[Point]:
    return [(x, y) for x, y in zip(line.x, line.y, strict=False) if x is not None and y is not None]


def _thinned(line: Line) -> Line:
    """Every k-th point of a long line, and the last: a screen has no more pixels to show."""
    stride = math.ceil(len(line.x) / MOST_POINTS)
    if stride <= 1 or not line.joined or line.labels or line.low:
        return line
    kept = sorted({*range(0, len(line.x), stride), len(line.x) - 1})
    return Line(line.name, tuple(line.x[i] for i in kept), tuple(line.y[i] for i in kept))


def _padded(values: Iterable[float], *, share: float) -> Range:
    values = list(values)
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a flat line in the middle
        spread = abs(high) * 0.1 or 1.0
        return low - spread, high + spread
    return low - share * (high - low), high + share * (high - low)


def _x(value: float, ends: Range) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - ends[0]) / (ends[1] - ends[0])


def _y(value: float, ends: Range) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ends[0]) / (ends[1] - ends[0])


def _axes(x_range: Range, y_range: Range, *, whole: bool, x_label: str, y_label: str) -> Iterable[str]:
    for tick in ticks(*y_range):
        y = f"{_y(tick, y_range):.1f}"
        kind = "zero" if tick == 0 else "grid"
        yield f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="end" x="{LEFT - 6}" y="{y}" dy="4">{short(tick)}</text>'
    for tick in ticks(*x_range, whole=whole):
        yield f'<text class="middle" x="{_x(tick, x_range):.1f}" y="{HEIGHT - BOTTOM + 16}">{short(tick)}</text>'
    yield f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{text(x_label)}</text>'
    yield f'<text x="4" y="9">{text(y_label)}</text>'


def _series(line: Line, colour: int, x_range: Range, y_range: Range) -> Iterable[str]:
    places = [
        None if x is None or y is None else (_x(x, x_range), _y(y, y_range))
        for x, y in zip(line.x, line.y, strict=False)
    ]
    if line.joined:
        yield f'<path class="s{colour}" d="{_path(places)}"/>'
    for low, high, place in zip(line.low, line.high, places, strict=False):
        if place is not None:
            ends = f'y1="{_y(low, y_range):.1f}" y2="{_y(high, y_range):.1f}"'
            yield f'<line class="s{colour}" x1="{place[0]:.1f}" x2="{place[0]:.1f}" {ends}/>'
    lonely = sum(place is not None for place in places) == 1
    for i, place in enumerate(places):
        if place is None:
            continue
        x, y = place
        label = line.labels[i] if i < len(line.labels) else ""
        hover = " · ".join(filter(None, [line.name, label, f"{short(line.x[i] or 0)}, {short(line.y[i] or 0)}"]))
        shown = "hit" if line.joined and not lonely else "dot"
        at = f'cx="{x:.1f}" cy="{y:.1f}" r="4"'
        yield f'<circle class="s{colour} {shown}" {at}><title>{text(hover)}</title></circle>'
        if label:
            # a label near the right edge goes to the left of its point
            side, shift = ("end", -8) if x > WIDTH - RIGHT - 8 * len(label) else ("start", 8)
            yield f'<text class="label {side}" x="{x + shift:.1f}" y="{y:.1f}" dy="4">{text(label)}</text>'


def _path(places: Sequence[Point | None]) -> str:
    """Line through the points, lifted at every gap."""
    parts, drawing = [], False
    for place in places:
        if place is not None:
            parts.append(f"{'L' if drawing else 'M'}{place[0]:.1f} {place[1]:.1f}")
        drawing = place is not None
    return "".join(parts)


def _change(lines: Sequence[Line]) -> str:
    """First and last value, where one line tells a story in time."""
    if len(lines) != 1 or not lines[0].joined:
        return ""
    values = _points(lines[0])
    if len(values) == 1:
        return f"<span>{short(values[0][1])}</span>"
    return f"<span>{short(values[0][1])} → {short(values[-1][1])}</span>"


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    items = (
        '<li><svg viewBox="0 0 14 14" aria-hidden="true">'
        f'<circle class="s{number % COLOURS + 1}" cx="7" cy="7" r="5"/></svg>{text(line.name)}</li>'
        for number, line in enumerate(lines)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _small_print(source: str, note: str) -> str:
    parts = [f"<code>{text(source)}</code>" if source else "", text(note)]
    words = " ".join(part for part in parts if part)
    return f"<small>{words}</small>" if words else ""


def _spoken(title: str, lines: Sequence[Line]) -> str:
    ends = (f"{line.name} from {short(_points(line)[0][1])} to {short(_points(line)[-1][1])}" for line in lines)
    return f"{title}: {'; '.join(ends)}"

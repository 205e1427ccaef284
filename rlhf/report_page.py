"""The pieces of the report page as HTML text. What comes from outside is escaped here: model text is hostile."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.figures import aligned, interval, short, text
from rlhf.progress import duration
from rlhf.report_data import Cell, Fact, Samples, Table

MOST_SAMPLES = 500
NOTHING = "-"

_HERE = Path(__file__).parent


def document(title: str, body: Iterable[str]) -> str:
    """The whole page: self-contained, and by its own policy unable to load or run anything else."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n</main><script>{script}</script></body></html>\n"
    )


def cell(value: Cell) -> str:
    """A table's cell: a number at reading precision, a text as it is, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value) if isinstance(value, float) else text(value)


def heading(title: str, subtitle: str = "") -> str:
    """The page's title and what stands below it."""
    return f'<h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p>'


def section(title: str, *parts: str) -> str:
    """A titled section, or nothing where it would be empty."""
    inner = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{inner}</section>" if inner else ""


def verdict(sentence: str) -> str:
    """The sentence that matters most."""
    return f'<p class="verdict">{text(sentence)}</p>' if sentence else ""


def facts_table(facts: Sequence[Fact]) -> str:
    """Results, one a row: name, value with interval, the interval drawn, a note."""
    rows = "".join(
        f'<tr><td>{text(fact.name)}</td><td class="number">{_with_interval(fact)}</td>'
        f'<td>{interval(fact)}</td><td class="soft">{text(fact.note)}</td></tr>'
        for fact in facts
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>' if rows else ""


def charts(figures: Iterable[str]) -> str:
    """Charts in a grid."""
    inner = "".join(figures)
    return f'<div class="charts">{inner}</div>' if inner else ""


def table(content: Table, *, style: str = "") -> str:
    """A small table with its title and note."""
    columns = list(zip(*content.rows, strict=True)) or [()] * len(content.columns)
    kinds = [' class="number"' if _is_numeric(column) else ' class="text"' for column in columns]
    head = "".join(f"<th{kind}>{text(name)}</th>" for kind, name in zip(kinds, content.columns, strict=True))
    shown = zip(*(_column(column) for column in columns), strict=True)
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{value}</td>" for kind, value in zip(kinds, row, strict=True)) + "</tr>"
        for row in shown
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(content.columns) else ""
    title = f"<h3>{text(content.title)}</h3>" if content.title else ""
    note = f"<small>{text(content.note)}</small>" if content.note else ""
    body = f'<table class="{style}">{head}<tbody>{rows}</tbody></table>'
    return f'{title}<div class="scroll">{body}</div>{note}'


def samples_block(samples: Samples | None) -> str:
    """Texts side by side, ten at a time, with a filter and an order; without scripts, all of them."""
    if samples is None or not samples.rows:
        return ""
    shown = samples.rows[:MOST_SAMPLES]
    numeric = [_is_numeric(column) for column in zip(*shown, strict=True)]
    names = [name for name, is_number in zip(samples.columns, numeric, strict=True) if is_number]
    orders = "".join(
        f'<option value="{i} {sign}">{text(name)}, {word} first</option>'
        for i, name in enumerate(names)
        for sign, word in ((-1, "highest"), (1, "lowest"))
    )
    cards = "".join(_card(samples.columns, row, numeric) for row in shown)
    left_out = len(samples.rows) - len(shown)
    note = f"<small>{left_out} more are in samples.jsonl.</small>" if left_out else ""
    return (
        '<div class="samples"><div class="tools" hidden>'
        '<input type="search" placeholder="contains…" aria-label="Show samples that contain">'
        f'<select aria-label="Order"><option value="0 0">as drawn</option>{orders}</select>'
        '<button type="button">Back</button><button type="button">Next</button><span class="soft"></span></div>'
        f'<div class="list">{cards}</div>{note}</div>'
    )


def alert_list(alerts: Sequence[Mapping[str, Any]]) -> str:
    """What the stage wanted a person to look at."""
    items = "".join(
        f"<li><b>{text(alert.get('level', 'warn'))}</b> step {text(alert.get('step', '?'))}: "
        f"{text(alert.get('title', ''))}. {text(alert.get('text', ''))}</li>"
        for alert in alerts
    )
    return f'<h3>Alerts</h3><ul class="alerts">{items}</ul>' if items else ""


def settings(title: str, content: str) -> str:
    """A folded block of plain text, such as a config file."""
    return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>" if content else ""


def commands(lines: Sequence[str]) -> str:
    """Commands to copy."""
    return f"<pre>{text(chr(10).join(lines))}</pre>" if lines else ""


def environment_table(environment: Mapping[str, Any]) -> str:
    """Versions, machine and revision."""
    packages = {name: version for name, version in (environment.get("packages") or {}).items() if version}
    gpus = ", ".join(environment.get("gpus") or []) or "none"
    named = {
        "code": environment.get("git"),
        "python": environment.get("python"),
        "machine": f"{environment.get('cpu')}, {environment.get('cores')} cores, GPU: {gpus}",
        "platform": environment.get("platform"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    rows = tuple((name, value or NOTHING) for name, value in named.items())
    return table(Table("", ("", ""), rows)) if environment else ""


def stage_time(environment: Mapping[str, Any]) -> str:
    """How long a stage took, resumed parts included."""
    seconds = environment.get("seconds")
    return duration(seconds) if isinstance(seconds, int | float) else NOTHING


def _with_interval(fact: Fact) -> str:
    if fact.low is None or fact.high is None or not isinstance(fact.value, int | float):
        return cell(fact.value)
    width = fact.high - fact.low  # two digits of the interval say all there is to say
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 6) if width > 0 else 3
    value, low, high = aligned([fact.value, fact.low, fact.high], decimals)
    return f'{value} <span class="soft">({low} to {high})</span>'


def _is_numeric(column: Sequence[Cell]) -> bool:
    found = [value for value in column if value is not None]
    return bool(found) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)


def _column(column: Sequence[Cell]) -> list[str]:
    """A column's cells; numbers with the same count of decimals."""
    floats = [value for value in column if isinstance(value, float) and math.isfinite(value)]
    if not _is_numeric(column) or not floats:
        return [cell(value) for value in column]
    shown = iter(aligned(floats))
    return [next(shown) if isinstance(value, float) and math.isfinite(value) else cell(value) for value in column]


def _card(columns: Sequence[str], row: Sequence[Cell], numeric: Sequence[bool]) -> str:
    """One prompt with its completions beside each other and its numbers above them."""
    parts = list(zip(columns, row, numeric, strict=True))
    numbers = [(name, value) for name, value, is_number in parts if is_number]
    texts = [(name, value) for name, value, is_number in parts if not is_number]
    prompts = [(name, value) for name, value in texts if name.lower() == "prompt"]
    sides = [part for part in texts if part not in prompts]
    chips = "".join(f'<span><span class="soft">{text(name)}</span> {cell(value)}</span>' for name, value in numbers)
    data = " ".join("NaN" if value is None else f"{float(value):.6g}" for _, value in numbers)
    return (
        f'<article class="sample" data-numbers="{data}"><div class="chips">{chips}</div>'
        + "".join(_words(name, value, "words prompt") for name, value in prompts)
        + f'<div class="sides">{"".join(_words(name, value, "words") for name, value in sides)}</div></article>'
    )


def _words(name: str, value: Cell, style: str) -> str:
    return f'<div><h4>{text(name)}</h4><div class="{style}" dir="auto">{cell(value)}</div></div>'

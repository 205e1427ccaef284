"""The pieces of the report page as HTML text. What comes from outside is escaped here: model text is hostile."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.figures import aligned, interval, text
from rlhf.progress import duration
from rlhf.report_data import Cell, Fact, Table
from rlhf.report_samples import NOTHING, cell, is_numeric, samples_block
from rlhf.report_words import WORDS

__all__ = ["NOTHING", "samples_block"]

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


def words_used(content: str) -> str:
    """The words of the field that occur in `content`, each in a sentence; folded."""
    plain = re.sub(r"<[^>]*>", " ", content)
    used = {word: why for word, why in WORDS.items() if re.search(rf"\b{re.escape(word)}", plain, re.IGNORECASE)}
    items = "".join(f"<dt>{text(word)}</dt><dd>{text(why)}</dd>" for word, why in used.items())
    return f"<details><summary>The words on this page</summary><dl>{items}</dl></details>" if used else ""


def facts_table(facts: Sequence[Fact]) -> str:
    """Results, one a row: name, value with interval, the interval drawn, a note."""
    rows = "".join(
        f'<tr><td>{text(fact.name)}</td><td class="number">{_with_interval(fact)}</td>'
        f'<td>{interval(fact)}</td><td class="soft">{text(fact.note)}</td></tr>'
        for fact in facts
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>' if rows else ""


def charts(figures: Iterable[str], *, folded: Iterable[str] = ()) -> str:
    """Charts in a grid, those that few need folded below."""
    inner, more = "".join(figures), [figure for figure in folded if figure]
    shown = f'<div class="charts">{inner}</div>' if inner else ""
    if not more:
        return shown
    return (
        f'{shown}<details><summary>{len(more)} more curves</summary><div class="charts">{"".join(more)}</div></details>'
    )


def table(content: Table, *, style: str = "") -> str:
    """A small table with its title and note."""
    columns = list(zip(*content.rows, strict=True)) or [()] * len(content.columns)
    kinds = [' class="number"' if is_numeric(column) else ' class="text"' for column in columns]
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


def alert_list(alerts: Sequence[Mapping[str, Any]]) -> str:
    """What the stage wanted a person to look at."""
    items = "".join(
        f"<li><b>{text(alert.get('level', 'warn'))}</b> Step {text(alert.get('step', '?'))}: "
        f'{text(alert.get("title", ""))}. <span class="soft">What to do: {text(alert.get("text", ""))}</span></li>'
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


def _estimate(words: str) -> str:
    """`0.31 (0.25 to 0.37)` with a quieter interval, which goes below the number where there is little room."""
    return re.sub(r"^(\S+) (\(\S+ to \S+\))$", r'\1 <span class="soft interval">\2</span>', words)


def _column(column: Sequence[Cell]) -> list[str]:
    """A column's cells; numbers with the same count of decimals."""
    floats = [value for value in column if isinstance(value, float) and math.isfinite(value)]
    if not is_numeric(column) or not floats:
        return [_estimate(cell(value)) for value in column]
    shown = iter(aligned(floats))
    return [next(shown) if isinstance(value, float) and math.isfinite(value) else cell(value) for value in column]

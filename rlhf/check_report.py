"""What a check found, and how it is shown: a table with a verdict for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Status = Literal["pass", "note", "fail", "skip"]
"""`note`: found in the source, but mended or ignored by this project, or harmless here. Only `fail` fails."""

COLOURS = {"pass": "green", "note": "yellow", "fail": "bold red", "skip": "dim"}
WIDE = 110
"""Columns of a terminal in which the table also says what must hold."""
WORSE = ("skip", "pass", "note", "fail")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `measured` is not above `bound` where the check passes, if both are numbers."""

    status: Status
    measured: float | str = ""
    bound: float | str = ""
    cause: str = ""
    advice: str = ""


def passed(measured: float | str = "", bound: float | str = "") -> Finding:
    """The invariant holds."""
    return Finding("pass", measured, bound)


def noted(cause: str, advice: str, measured: float | str = "") -> Finding:
    """The invariant holds here, but only because this project mends what the source has."""
    return Finding("note", measured, "", cause, advice)


def failed(cause: str, advice: str, measured: float | str = "", bound: float | str = "") -> Finding:
    """The invariant does not hold."""
    return Finding("fail", measured, bound, cause, advice)


def skipped(why: str) -> Finding:
    """The invariant says nothing about this model."""
    return Finding("skip", cause=why)


def within(measured: float, bound: float, *, cause: str, advice: str) -> Finding:
    """Passes where `measured` is at most `bound`; NaN is not."""
    return passed(measured, bound) if measured <= bound else failed(cause, advice, measured, bound)


@dataclass(frozen=True)
class Result:
    """One check of one subject."""

    check: str
    title: str
    trainable: str | None
    """What was trained where the check was made once for each technique."""
    finding: Finding
    seconds: float


@dataclass(frozen=True)
class Report:
    """All results on one model."""

    model: str
    reward: str | None
    precision: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.of("fail")

    def of(self, status: Status) -> list[Result]:
        """The results with this status."""
        return [result for result in self.results if result.finding.status == status]

    @property
    def verdict(self) -> str:
        """The report in one line."""
        bad, notes = _names(self.of("fail")), _names(self.of("note"))
        done = len(_names(result for result in self.results if result.finding.status != "skip"))
        also = f"; noted: {', '.join(notes)}" if notes else ""
        if bad:
            return f"FAIL: {len(bad)} of {done} checks do not hold: {', '.join(bad)}{also}"
        return f"PASS: all {done} checks hold{also}"

    def to_json(self) -> str:
        """The report as one JSON object."""
        results = [_flat(result) for result in self.results]
        whole = {
            "passed": self.passed,
            "verdict": self.verdict,
            **asdict(replace(self, results=())),
            "results": results,
        }
        return json.dumps(whole, ensure_ascii=False)

    def print(self, console: Any) -> None:
        """Write table, causes with advice, and verdict to a rich console."""
        console.print(self._table(wide=console.width >= WIDE))
        for cause, advice, status, names in _explained(self.results):
            console.print(f"[{COLOURS[status]}]{status}[/] [bold]{names}[/]:", _safe(cause), soft_wrap=True)
            console.print("     ", _safe(advice), soft_wrap=True)
        console.print(f"[{'green' if self.passed else 'bold red'}]{_safe(self.verdict)}[/]", soft_wrap=True)

    def _table(self, *, wide: bool) -> Any:
        """A line for each check; what must hold is said where there is room for it."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = f"{self.model}, computed in {self.precision}, {self.seconds:.0f} s"
        table = Table(title=_safe(title), box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for name in ("check", "result", "trainable", "measured", "must be"):
            table.add_column(name, no_wrap=name in ("check", "result"))
        if wide:
            table.add_column("what must hold")
        everywhere = {result.trainable for result in self.results if result.trainable}
        for group in _grouped(self.results):
            worst = max(group, key=lambda result: _size(result.finding.measured))
            found = worst.finding
            result = f"[{COLOURS[found.status]}]{found.status}[/]"
            shown = (_trainables(group, everywhere), _number(found.measured), _number(found.bound, "<= "))
            table.add_row(worst.check, result, *map(_safe, shown), *([_safe(worst.title)] if wide else []))
        return table


def _names(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.check for result in results))


def _flat(result: Result) -> dict[str, Any]:
    """JSON knows neither NaN nor infinity."""
    flat = asdict(result)
    finding = flat.pop("finding")
    for name in ("measured", "bound"):
        value = finding[name]
        finding[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return flat | finding


def _grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Results of one check with one status share a row; a skip has one only where there is nothing else."""
    groups: dict[str, dict[Status, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.check, {}).setdefault(result.finding.status, []).append(result)
    return [rows for found in groups.values() for status, rows in found.items() if status != "skip" or len(found) == 1]


def _explained(results: Iterable[Result]) -> list[tuple[str, str, Status, str]]:
    """Every cause once, failures last, with the checks that found it."""
    results = list(results)
    found: dict[tuple[str, str, Status], dict[str, list[Result]]] = {}
    for result in results:
        finding = result.finding
        if finding.status in ("note", "fail"):
            checks = found.setdefault((finding.cause, finding.advice, finding.status), {})
            checks.setdefault(result.check, []).append(result)
    everywhere = {result.trainable for result in results if result.trainable}
    causes = sorted(found, key=lambda key: WORSE.index(key[2]))
    return [(*key, ", ".join(_where(*item, everywhere) for item in found[key].items())) for key in causes]


def _where(check: str, group: list[Result], everywhere: set[str]) -> str:
    trainables = _trainables(group, everywhere)
    return f"{check} ({trainables})" if trainables else check


def _trainables(group: list[Result], everywhere: set[str]) -> str:
    """Those that a row speaks of: "each of 4" where it is all of them."""
    names = [result.trainable for result in group if result.trainable]
    return f"each of {len(names)}" if len(names) == len(everywhere) > 1 else ", ".join(names)


def _size(measured: float | str) -> float:
    return math.inf if isinstance(measured, float) and math.isnan(measured) else _as_float(measured)


def _as_float(value: float | str) -> float:
    return float(value) if isinstance(value, int | float) else -math.inf


def _number(value: float | str, before: str = "") -> str:
    return value if isinstance(value, str) else f"{before}{value:.2g}"


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)

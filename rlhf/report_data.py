"""What a stage leaves for its report: `report.json`. Plain records that any stage can fill and any reader can parse."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.run_folder import REPORT_DATA, finite, read_json, write_json

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Fact:
    """One result, with its 95 % interval where there is one.

    `reference` is the value that would mean "no difference" (0.5 for a win rate, 0 for a gain): drawn with it.
    """

    name: str
    value: Cell
    low: float | None = None
    high: float | None = None
    note: str = ""
    reference: float | None = None


@dataclass(frozen=True)
class Curve:
    """Numbers of `metrics.jsonl`: keys `y` over key `x`, drawn in one chart."""

    title: str
    y: tuple[str, ...]
    x: str = "step"
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One series of a plot; `labels`, `low` and `high` belong to its points. Not `joined`: only points are drawn."""

    name: str
    x: tuple[float | None, ...]
    y: tuple[float | None, ...]
    labels: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    joined: bool = True


@dataclass(frozen=True)
class Plot:
    """A chart of numbers that stand in no `metrics.jsonl`, such as score against KL with the best-of-n points."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A small table, such as agreement between annotators."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """Texts to read side by side: a column of prompts, columns of completions, columns of numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class ReportData:
    """All that a stage has to say. `verdict` is one sentence that a reader may quote, uncertainty included."""

    title: str
    verdict: str = ""
    facts: tuple[Fact, ...] = ()
    curves: tuple[Curve, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: Samples | None = None

    def to_json(self) -> dict[str, Any]:
        """As `report.json` holds it; numbers that are not finite become null."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ReportData:
        """Read back what `to_json` made; keys of other versions are passed over."""
        nested = {"facts": Fact, "curves": Curve, "tables": Table}
        parts = {name: tuple(_build(kind, item) for item in record.get(name) or ()) for name, kind in nested.items()}
        plots = tuple(
            _build(Plot, {**plot, "lines": tuple(_build(Line, line) for line in plot["lines"])})
            for plot in record.get("plots") or ()
        )
        samples = record.get("samples")
        return cls(
            title=record.get("title", ""),
            verdict=record.get("verdict", ""),
            plots=plots,
            samples=_build(Samples, samples) if samples else None,
            **parts,  # pyright: ignore[reportArgumentType]
        )


def write_report_data(folder: Path, data: ReportData) -> Path:
    """Leave `report.json` in a stage's folder for `rlhf.report.render`."""
    path = Path(folder) / REPORT_DATA
    write_json(path, data.to_json())
    return path


def read_report_data(folder: Path) -> ReportData | None:
    """The stage's `report.json`, or None where it left none."""
    record = read_json(Path(folder) / REPORT_DATA)
    return ReportData.from_json(record) if record else None


def _build(kind: type, record: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: _frozen(value) for name, value in record.items() if name in names})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value)

"""The files of a run folder: their names, and how to write them so that a crash leaves them readable."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

CONFIG, ENVIRONMENT, WANDB_ID = "config.yaml", "env.json", "wandb_id"
METRICS, SAMPLES, ALERTS, SUMMARY = "metrics.jsonl", "samples.jsonl", "alerts.jsonl", "summary.json"
REPORT_DATA, REPORT = "report.json", "report.html"


def open_to_append(path: Path) -> TextIO:
    """A text file at its end. Half a character, which a model may emit, becomes a question mark."""
    return path.open("a", encoding="utf-8", errors="replace")


def append_record(file: TextIO, record: Mapping[str, Any]) -> None:
    """Add one JSON line and hand it to the system at once. Raises ValueError for NaN, which JSON does not know."""
    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file, none where there is no file. A line that a crash tore in half is left out."""
    if not path.is_file():
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return [record for record in records if isinstance(record, dict)]


def cut_after(path: Path, step: int) -> None:
    """Keep the records up to `step`, byte for byte, and no torn line."""
    if not path.is_file():
        return
    kept = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line.rstrip("\n") + "\n")
            except ValueError:
                continue
    write_atomically(path, "".join(kept))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, readable by people too."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace the file as a whole: a reader sees the old text or the new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def plain_number(value: Any) -> float | int:
    """A Python number from a number of any library (numpy scalar, tensor of one element)."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value)


def finite(value: Any) -> Any:
    """The value, or None for a NaN or an infinity, which JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_cell(value: Any) -> Any:
    """A text, number, bool or None; anything else as JSON text."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Number) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0):
        return finite(plain_number(value))
    return json.dumps(value, ensure_ascii=False, default=str)

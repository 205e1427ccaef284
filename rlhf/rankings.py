"""Rankings as JSON lines: the form in which the label store gives and takes them, and people exchange them."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.sources import check_messages, check_text, numbered_rows
from rlhf.types import DataError, Prompt, Ranking

MOST = 2**31 - 1
"""The largest whole number that both databases keep."""


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its line (from 1) and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class RankingFile:
    """The good rankings of a file, and the rows that could not be used."""

    rankings: list[Ranking]
    bad: list[BadRow]


def read_rankings(path: str | Path, columns: Mapping[str, str] | None = None) -> RankingFile:
    """Rankings, one a row; rows that cannot be used are listed with line and reason.

    `columns` maps our name -> the user's. Raises DataError where the file cannot be read or no row can be used.
    """
    ours = {theirs: name for name, theirs in (columns or {}).items()}
    rankings: list[Ranking] = []
    bad: list[BadRow] = []
    for number, row in numbered_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            rankings.append(ranking_from_json({ours.get(name, name): value for name, value in row.items()}))
        except DataError as error:
            bad.append(BadRow(number, str(error).removeprefix(f"{path}:{number}: ")))
    if not rankings:
        more = f" (and {len(bad) - 1} more rows that cannot be used)" if len(bad) > 1 else ""
        reason = f"; line {bad[0].line}: {bad[0].reason}{more}" if bad else ", it is empty: collect some first"
        raise DataError(f"{path} holds no usable ranking{reason}")
    return RankingFile(rankings, bad)


def write_rankings(path: str | Path, rankings: Iterable[Ranking]) -> None:
    """Write rankings as JSON lines, all or nothing: a crash leaves the old file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(ranking_to_json(item), ensure_ascii=False) + "\n" for item in rankings)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def ranking_to_json(ranking: Ranking) -> dict[str, Any]:
    """The exchange form of a ranking; `ranking_from_json` reads it back."""
    return asdict(ranking)


def ranking_from_json(row: Mapping[str, Any]) -> Ranking:
    """A ranking from its exchange form; other keys are left aside. Raises DataError naming the field."""
    for name in ("prompt", "completions", "ranks", "annotator"):
        if name not in row:
            found = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"there is no {name!r}; found {found}: a column of another name is --columns.{name} NAME")
    seconds = row.get("seconds")
    _check(
        seconds is None or (_is_number(seconds) and math.isfinite(seconds) and seconds >= 0),
        "seconds",
        seconds,
        "a number, 0 or more, or null",
    )
    # A model may say nothing at all, and that is ranked like anything else.
    texts = [check_text(text, "a completion", may_be_empty=True) for text in _list(row, "completions")]
    return Ranking(
        prompt=_prompt(row["prompt"]),
        completions=tuple(texts),
        ranks=tuple(_list(row, "ranks")),
        annotator=check_text(row["annotator"], "annotator"),
        presented_order=_order(row),
        flags=_flags(row),
        rationale=_text(row, "rationale"),
        seconds=None if seconds is None else float(seconds),
        round=_whole(row, "round", default=0),
        guideline_version=_whole(row, "guideline_version", default=1),
        created_at=_text(row, "created_at"),
    )


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise DataError(f"{name} is {value!r}, but it must be {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _prompt(value: object) -> Prompt:
    return check_messages(value, "prompt") if isinstance(value, list) else check_text(value, "prompt")


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    _check(isinstance(row[name], list), name, row[name], "a list")
    return row[name]


def _order(row: Mapping[str, Any]) -> tuple[int, ...] | None:
    if row.get("presented_order") is None:
        return None
    order = _list(row, "presented_order")
    whole = all(isinstance(index, int) and not isinstance(index, bool) for index in order)
    _check(whole, "presented_order", order, "a list of indices")
    return tuple(order)


def _flags(row: Mapping[str, Any]) -> dict[str, Any]:
    flags = dict(_optional(row, "flags", dict) or {})
    try:
        json.dumps(flags, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise DataError(f"flags cannot be kept ({error})") from error
    marks = flags.get("marks", [])
    known = isinstance(marks, list) and all(isinstance(mark, str) for mark in marks)
    _check(known, "marks in flags", marks, "a list of texts")
    return flags


def _text(row: Mapping[str, Any], name: str) -> str | None:
    text = _optional(row, name, str)
    return None if text is None else check_text(text, name, may_be_empty=True)


def _optional(row: Mapping[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    _check(value is None or isinstance(value, kind), name, value, f"a {kind.__name__} or null")
    return value


def _whole(row: Mapping[str, Any], name: str, default: int) -> int:
    value = row.get(name, default)
    whole = isinstance(value, int) and not isinstance(value, bool)
    _check(whole and 0 <= value <= MOST, name, value, f"a whole number from 0 to {MOST}")
    return value

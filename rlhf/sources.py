"""Rows from wherever people keep data: files, folders, the hub, or a function of theirs.

Bad rows are named by file and line. What the columns mean is the business of `rlhf.data`.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlhf.types import ConfigError, DataError, Message, UserError

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")

Row = dict[str, Any] | DataError
"""A row with named columns, or why there is none at this place."""


def read_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set as (where, row); `where` is "file.jsonl:17", for messages.

    `source` is a JSON lines, JSON, CSV or parquet file (the first three also as .gz), a folder saved by `datasets`, a
    hub id, or `module:function` whose call gives rows. A split other than train is `folder:test` or `owner/name:test`.
    Raises DataError naming file and line.
    """
    for number, row in numbered_rows(source):
        if isinstance(row, DataError):
            raise row
        yield f"{source}:{number}", row


def resolve(spec: str) -> Callable[..., Any]:
    """The callable that `module:function` names; modules of the current folder count. Raises ConfigError."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{spec!r} does not name a function: write it as module:function")
    found = _module(module_name, spec)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{spec!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{spec!r} is a {type(found).__name__}, not a function")
    return found


def _module(name: str, spec: str) -> Any:
    if os.getcwd() not in sys.path:  # a console script, unlike `python -m`, does not see the current folder
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            where = f"in {os.getcwd()} or among the installed packages"
            raise ConfigError(f"{spec!r}: there is no module {error.name!r} {where}") from error
        raise ConfigError(f"{spec!r}: {name} itself imports {error.name!r}, which is not installed") from error
    except Exception as error:  # whatever the user's own module does while it is imported
        raise ConfigError(f"{spec!r}: importing {name} failed{told(error)}: mend the module") from error


def told(error: BaseException) -> str:
    """` with ValueError: why (file.py, line 3)`: what went wrong in a user's own code, and where."""
    if isinstance(error, SyntaxError):
        return f" with SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    last = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    where = f" ({last.filename}, line {last.lineno})" if last and last.filename != __file__ else ""
    said = next(iter(str(error).splitlines()), "")
    return f" with {type(error).__name__}: {said}{where}"


def numbered_rows(source: str | Path) -> Iterator[tuple[int, Row]]:
    """(line or row number from 1, row); a row that cannot be read is a DataError in its place, not raised."""
    for number, row in _rows(str(source)):
        if isinstance(row, DataError):
            yield number, row
        elif isinstance(row, Mapping):
            yield number, dict(row)
        else:
            yield number, DataError(f"{source}:{number}: {_shown(row)} is no row with named columns, as {{...}} is")


def _rows(source: str) -> Iterator[tuple[int, Any]]:
    path = Path(source)
    if path.is_file():
        return _file_rows(path)
    if path.is_dir():
        return _folder_rows(path, split=None)
    if path.name.removesuffix(".gz").endswith(FILE_TYPES):
        raise DataError(f"{source}: there is no such file (looked from {os.getcwd()})")
    if ":" not in source:
        return _hub_rows(source, split=None)
    head, _, tail = source.rpartition(":")
    if Path(head).is_dir():
        return _folder_rows(Path(head), split=tail)
    return _hub_rows(head, split=tail) if "/" in head else enumerate(_called_rows(source), start=1)


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".csv":
        return _csv_rows(path)
    if kind in (".jsonl", ".json"):
        return _json_array_rows(path) if _starts_with(path, b"[") else _json_lines(path)
    raise DataError(f"{path}: unknown file type {kind!r}; use one of {', '.join(FILE_TYPES)} (.gz allowed)")


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that hold anything. Splits on "\\n" only: text may hold U+2028 and its like."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error})") from error


def _starts_with(path: Path, mark: bytes) -> bool:
    return next((line.lstrip().startswith(mark) for _, line in _lines(path)), False)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
            f"convert the file to UTF-8, for instance with `iconv -t UTF-8 -f` and its encoding"
        ) from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        try:
            yield number, json.loads(_decoded(path, number, line))
        except DataError as error:
            yield number, error
        except json.JSONDecodeError as error:
            problem = f"{path}:{number}: not JSON ({error.msg} at column {error.colno})"
            yield number, DataError(f"{problem}: write one object a line, or one list of objects")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
            yield number, DataError(f"{path}:{number}: JSON that cannot be read ({error})")


def _json_array_rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = "".join(_decoded(path, number, line) for number, line in _lines(path))
    try:
        yield from enumerate(json.loads(text), start=1)
    except json.JSONDecodeError as error:
        problem = f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{problem}: write one list of objects, or one object a line (is the file cut off?)") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read ({error})") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((_decoded(path, number, line) for number, line in _lines(path)), strict=True)
    try:
        for row in reader:
            ragged = None in row or None in row.values()
            problem = (
                f"{path}:{reader.line_num}: this row has another number of columns than the header: "
                f"put cells that hold commas in quotes"
            )
            yield reader.line_num, DataError(problem) if ragged else row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _folder_rows(path: Path, split: str | None) -> Iterator[tuple[int, Any]]:
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{path}: this folder was not saved by `datasets` ({error}); name a file in it ({', '.join(FILE_TYPES)})"
        ) from error
    return enumerate(_one_split(loaded, str(path), split), start=1)


def _hub_rows(name: str, split: str | None) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as error:  # the hub client raises a dozen kinds, from no network to no such set
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{name}: neither a file or folder here nor a data set that the hub gives us ({reason}): "
            f"check the path (looked from {os.getcwd()})"
        ) from error
    return enumerate(_one_split(loaded, name, split), start=1)


def _one_split(loaded: Any, source: str, split: str | None) -> Iterable[Any]:
    if not isinstance(loaded, Mapping):
        return loaded
    chosen = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise DataError(
            f"{source} has no split {chosen!r} but {', '.join(loaded)}: write {source}:{next(iter(loaded))}"
        )
    return loaded[chosen]


def _called_rows(spec: str) -> Iterable[Any]:
    try:
        rows = resolve(spec)()
    except UserError:
        raise
    except Exception as error:  # the function is the user's
        raise DataError(f"{spec} failed{told(error)}: it is called without arguments and returns rows") from error
    if not isinstance(rows, Iterable) or isinstance(rows, str | bytes | Mapping):
        raise DataError(f"{spec} returned a {type(rows).__name__}, not rows (an iterable of dicts)")
    return rows


def check_text(value: object, what: str, *, may_be_empty: bool = False) -> str:
    """The value, if it is a text that holds anything; raises DataError saying what it is instead."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {_shown(value)}, not a text")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{what} is empty: fill it in, or leave the row out")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise DataError(f"{what} holds half a surrogate pair, which is not a character")
    if "\0" in value:
        raise DataError(f"{what} holds a NUL character, which PostgreSQL cannot keep: take it out")
    return value


def check_messages(value: object, what: str) -> list[Message]:
    """The value as turns of a conversation with role and content only; raises DataError saying what it is instead."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} is {_shown(value)}, not a list of messages")
    for turn in value:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise DataError(f"a turn of {what} is {_shown(turn)}, not {{role: ..., content: ...}}")
    return [
        Message(
            role=check_text(turn["role"], f"a role in {what}"),
            content=check_text(turn["content"], f"a content in {what}"),
        )
        for turn in value
    ]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The files of a run folder: their names, and how to write them so that a crash leaves them readable."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from rlhf.types import ConfigError, UserError

CONFIG, ENVIRONMENT, WANDB_ID = "config.yaml", "env.json", "wandb_id"
METRICS, SAMPLES, ALERTS, SUMMARY = "metrics.jsonl", "samples.jsonl", "alerts.jsonl", "summary.json"
REPORT_DATA, REPORT = "report.json", "report.html"
LOCK = ".lock"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
FAILED_WRITE = re.compile(r"PytorchStreamWriter failed|iostream error|inline_container\.cc.*unexpected pos")
"""What torch says, without a number, where the system would not take its bytes."""


@contextmanager
def held(folder: Path, *, otherwise: str) -> Iterator[None]:
    """Make a folder and hold it, so that one process writes into it; the system lets go when the process ends.

    Raises ConfigError for a folder that cannot be written, and while another process holds it; `otherwise` is what the
    message advises then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to ({error.strerror}): {otherwise}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"process {file.read().strip()} is working in {folder}: wait for it, or {otherwise}"
            ) from None
        with suppress(OSError):  # the number is for the message only
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield


def disk_fault(error: BaseException | None) -> UserError | None:
    """The user's version of an error that a full or forbidden disk has caused; None for any other error."""
    while error is not None:
        named = re.search(r"os error (\d+)", str(error))  # so safetensors, whose errors are no OSError
        number = error.errno if isinstance(error, OSError) else int(named[1]) if named else None
        place = getattr(error, "filename", None)
        where = f"{place}: " if place else ""
        if number in DISK_FULL or FAILED_WRITE.search(str(error)):
            reason = os.strerror(number or errno.ENOSPC)
            return UserError(
                f"{where}{reason}. Make room on that disk and repeat the command: what was saved before is whole, and "
                f"it goes on from there"
            )
        if number in NOT_ALLOWED:
            return UserError(f"{where}{os.strerror(number)}: choose a file or folder that you may read and write there")
        error = error.__cause__
    return None


def open_to_append(path: Path) -> FileIO:
    """A file at its end, for `append_record`."""
    return FileIO(path, "a")


def append_record(file: FileIO, record: Mapping[str, Any]) -> None:
    """Add one JSON line, handed to the system at once: all of it, or, where the disk is full, nothing (OSError).

    Half a character, which a model may emit, becomes a question mark. Raises ValueError for NaN, which JSON does not
    know.
    """
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="replace")
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with suppress(OSError):  # a device has no length
            os.ftruncate(file.fileno(), end)
        raise OSError(error.errno, error.strerror, str(file.name)) from error


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
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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

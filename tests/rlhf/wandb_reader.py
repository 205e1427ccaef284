"""Reads an offline wandb run back from its file, to see what a dashboard would show.

The file is a LevelDB log after a 7-byte header: blocks of 32 KiB that hold fragments (crc 4 bytes, length 2, type 1:
whole, first, middle, last), each assembled record being one protobuf `Record`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def run_files(folder: Path) -> list[Path]:
    """The offline run files under a run folder, oldest first, once wandb's own process has written all of them."""
    wandb.teardown()
    return sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))


def records(file: Path) -> Iterator[Any]:
    """All records of a run file, in order."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, pending = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK  # too little room for a fragment's head: the rest of the block is zeros
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue] (made at import)
            record.ParseFromString(pending)
            pending = b""
            yield record


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, one mapping per call."""
    return [_nested(record.history) for record in records(file) if record.WhichOneof("record_type") == "history"]


def tables(file: Path) -> list[dict[str, Any]]:
    """The tables that the history points to, as {"columns": [...], "data": [...]}."""
    found = [value["path"] for row in history(file) for value in row.values() if _is_table(value)]
    return [json.loads((file.parent / "files" / path).read_text(encoding="utf-8")) for path in found]


def _nested(row: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in row.item:
        *outer, last = list(item.nested_key) or [item.key]
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return values


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and value.get("_type") == "table-file"

"""Whether anything has changed: a hash of a stage's settings and of the content of what it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf.contract import digest

DONE = "done.json"
"""Written last into a stage's folder."""

SOURCES = (
    "data",
    "model",
    "prompts",
    "rankings",
    "reward",
    "policy",
    "baseline",
    "judge",
    "guidelines",
    "simulate.utility",
    "extras.ptx_data",
)
"""Fields that name something a stage reads. Its content counts, not its name alone."""


def fingerprint(config: Any, also_read: Mapping[str, str | None]) -> str:
    """A hash of a stage's settings and inputs; where its numbers are shown does not count."""
    settings = asdict(config)
    del settings["tracking"]
    sources = {field: _field(settings, field) for field in SOURCES} | dict(also_read)
    contents = {field: content(source) for field, source in sources.items() if source}
    return digest(json.dumps([settings, contents], sort_keys=True))


def _field(settings: Mapping[str, Any], dotted: str) -> Any:
    value: Any = settings
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def content(source: str) -> str:
    """A hash of what stands behind a path, store, stage's model or `module:function`; the text itself for other names.

    A stage's result counts as new when the stage ran again. Rankings are read out of a store, so that a look at the
    database, which changes the file, does not count as a change.
    """
    path = Path(source)
    done = path.parent / DONE
    if path.name == "model" and done.is_file():
        return _file_hash(done)
    if "://" in source or (path.is_file() and path.suffix == ".db"):
        from rlhf.store import Store

        with closing(Store(source, create=False)) as store:
            return store.content_hash()
    if path.is_file():
        return _file_hash(path)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return digest("".join(f"{f.relative_to(path)} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files))
    return _function_hash(source)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _function_hash(source: str) -> str:
    module = source.partition(":")[0]
    try:
        spec = find_spec(module) if ":" in source else None
    except (ImportError, ValueError):  # no module after all; the stage itself says what is wrong with it
        spec = None
    origin = Path(spec.origin) if spec and spec.origin else None
    return f"{source} {_file_hash(origin)}" if origin and origin.is_file() else source

"""How a benchmark's result is printed and kept: with its command, versions, seed and machine."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.environment import describe_environment

PRINTED = "-"


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """`--json`, alone or with a file."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=PRINTED,
        metavar="FILE",
        help="print one JSON object in place of the table; with FILE, print the table and keep the object there",
    )


def origin(module: str, given: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """What stands first in every result; call it before the work, while the machine's load is that of others."""
    hidden = ("json", "peer", "output")
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "seed": seed,
        "settings": {name: _plain(value) for name, value in vars(given).items() if name not in hidden},
        "environment": describe_environment() | {"load_before": round(os.getloadavg()[2], 2)},
    }


def publish(result: Mapping[str, Any], table: str, *, json_to: str | None) -> None:
    """Print or keep the result, as `--json` has it."""
    if json_to == PRINTED:
        print(json.dumps(result))
        return
    if json_to is not None:
        Path(json_to).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value

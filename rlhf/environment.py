"""What a result depends on besides its config: versions, machine, command. Imports none of what it names."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "gradio", "wandb", "numpy")


def describe_environment() -> dict[str, Any]:
    """Python, platform, processor, package versions, git revision and command line, ready for JSON."""
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git_revision(),
    }


def command_line() -> str:
    """The command that was typed, as a shell would take it again, without passwords."""
    program, *arguments = sys.argv or [""]
    return without_passwords(shlex.join([Path(program).name, *arguments]))


def without_passwords(text: str) -> str:
    """The text with the password of every URL (a database's, say) struck out."""
    return re.sub(r"(://[^:/@\s\"']*):[^@/\s\"']+@", r"\1:***@", text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The revision of this code, with `-dirty` where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str | None:
    found = _search_file(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$")
    return found or platform.processor() or None


def _gpus() -> list[str]:
    folder = Path("/proc/driver/nvidia/gpus")
    names = (_search_file(file, r"^Model:\s*(.+)$") for file in sorted(folder.glob("*/information")))
    return [name for name in names if name]


def _search_file(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found.group(1).strip() if found else None

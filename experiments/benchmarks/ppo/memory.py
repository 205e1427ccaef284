"""A process's own memory, as the kernel counts it."""

from __future__ import annotations

import importlib
from pathlib import Path

LATE = ("transformers.models.llama.modeling_llama", "accelerate", "peft", "datasets", "torch._dynamo")
"""Imported by both sides once they train; imports are not what is compared."""


def megabytes(name: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the most that ever was."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the kernel does not tell {name}")


def forget_peak() -> None:
    """Let the peak begin anew at what is resident now, with all imported that comes late."""
    for name in LATE:
        importlib.import_module(name)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

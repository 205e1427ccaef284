"""A process's own memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def megabytes(name: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the most that ever was."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the kernel does not tell {name}")


def forget_peak() -> None:
    """Let the peak begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

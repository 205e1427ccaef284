"""How much memory a run takes and how much there is: the process's own on a CPU, the allocator's on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
from pathlib import Path

import torch

STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class Gauge:
    """Bytes that are in use on a device. Outside Linux a process's peak cannot be forgotten, and what is live is it."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None

    def live(self) -> int:
        """In use now, after everything that was freed has been handed back; a new peak begins here."""
        gc.collect()
        if self._gpu is not None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._gpu)
            return torch.cuda.memory_allocated(self._gpu)
        _hand_back()
        if FORGET_PEAK.exists():
            FORGET_PEAK.write_text("5", encoding="utf-8")
        return _of_process("VmRSS")

    def peak(self) -> int:
        """The most that was in use since `live` was asked."""
        return torch.cuda.max_memory_allocated(self._gpu) if self._gpu is not None else _of_process("VmHWM")

    def available(self) -> float:
        """What this process could have in all: what it has, and what is free now."""
        if self._gpu is not None:
            free, _ = torch.cuda.mem_get_info(self._gpu)
            return free + torch.cuda.memory_reserved(self._gpu)
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(whole, _of_process("VmRSS") + min(_free_in_machine(), _free_in_container()))


def _hand_back() -> None:
    """Let malloc return what is free inside its heap, too (glibc only)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _of_process(name: str) -> int:
    found = _kilobytes(STATUS, name)
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _free_in_machine() -> int:
    found = _kilobytes(MEMORY, "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found


def _free_in_container() -> float:
    """Left of the control group's limit; files that the kernel keeps in memory give way and do not count."""
    try:
        limit, used = ((CGROUP / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used) + int(cached[1] if cached else 0)


def _kilobytes(path: Path, name: str) -> int | None:
    """The entry of a file of the kernel's, in bytes."""
    if not path.exists():
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None

"""How the process holds on to memory. Imports nothing heavy, and does nothing where the C library is not glibc."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_LARGEST = 2**31 - 1
_NEVER = -1


def keep_freed_memory() -> None:
    """Let malloc reuse large blocks instead of handing them back to the kernel after every use.

    A training step frees and takes the same tensors of tens of megabytes again and again; by default each is a new
    mapping whose pages the kernel zeroes at first touch. See `experiments/benchmarks/README.md` for what that costs.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: its allocator has its own ways
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _NEVER)  # the largest number means 2 GiB, and a step frees more

"""How long the command line takes to say something: the median of seven runs, against what we promise."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

RLHF = Path(sys.executable).with_name("rlhf")
PROMISES = {"--help": 0.5, "ppo --help": 1.0, "run --help": 1.0}
"""Arguments -> seconds."""
RUNS = 7


def seconds(arguments: str) -> float:
    """Wall-clock seconds of one command, in a new process."""
    started = time.perf_counter()
    subprocess.run([RLHF, *arguments.split()], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    """Print the table; the exit status is 1 where a promise is broken."""
    print(f"Python {platform.python_version()} on {platform.machine()}, median of {RUNS} runs")
    kept = True
    for arguments, promised in PROMISES.items():
        taken = median(seconds(arguments) for _ in range(RUNS))
        kept &= taken < promised
        print(f"rlhf {arguments:12} {taken:6.2f} s  (promised: under {promised} s)")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

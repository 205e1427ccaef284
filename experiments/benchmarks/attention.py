"""`python -m experiments.benchmarks.attention`: torch's fused attention against plain operations, on this machine.

Forward and backward of one layer in bf16, interleaved, medians of `--pairs` pairs. It decides
`rlhf.attention.LONGEST`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

SHAPES = ((32, 34), (32, 64), (16, 128), (8, 256), (4, 512), (2, 1024))
"""Sequences and their tokens."""
HEADS, WIDTH = 9, 64


def seconds(work: Callable[[], None]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(batch: int, length: int, pairs: int) -> dict[str, float]:
    """Median milliseconds of both, and their ratio."""
    import torch

    from rlhf.attention import attend

    shape = (batch, HEADS, length, WIDTH)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()

    def fused() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

    def plain() -> None:
        attend(None, query, key, value, mask, longest=length)[0].sum().backward()

    fused()
    plain()
    taken = [(seconds(fused), seconds(plain)) for _ in range(pairs)]
    slow, fast = (1000 * statistics.median(times) for times in zip(*taken, strict=True))
    return {"sequences": batch, "tokens": length, "fused_ms": slow, "plain_ms": fast, "ratio": slow / fast}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.attention", description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(batch, length, options.pairs) for batch, length in SHAPES]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'sequences':>10}{'tokens':>8}{'fused, ms':>11}{'plain, ms':>11}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['sequences']:>10}{row['tokens']:>8}{row['fused_ms']:>11.1f}{row['plain_ms']:>11.1f}"
            f"{row['ratio']:>7.2f}"
        )


if __name__ == "__main__":
    main()

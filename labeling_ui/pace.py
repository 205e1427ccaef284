"""How fast an annotator works, and when they will be done. Pure arithmetic; times are unix seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

LAST = 20
"""Items whose times count."""

ENOUGH = 5
"""With fewer times than this nothing is said."""

PAUSE = 900.0
"""Seconds: whoever saved nothing for so long was away."""


def per_hour(saved: Sequence[tuple[float, float | None]]) -> float | None:
    """Items per hour from the median time of the last items; None where they are too few.

    `saved` lists when each of an annotator's rankings was saved and how many seconds it took on the page, oldest first.
    An item's time is that since the one before was saved, which counts what lies between two items, too; after a pause
    it is the time on the page.
    """
    times = []
    for (before, _), (at, on_page) in pairwise(saved):
        time = at - before if at - before <= PAUSE else on_page
        if time is not None and time <= PAUSE:
            times.append(time)
    typical = median(times[-LAST:]) if len(times) >= ENOUGH else 0.0
    return 3600 / typical if typical > 0 else None


def minutes_left(
    mine: float | None, held: int, spaces: Mapping[int, int], others: Sequence[float], hidden_share: float = 0.0
) -> float | None:
    """Minutes until nothing is left for an annotator; None where their own pace is not known.

    `mine` and `others` are items per hour, `held` counts the items in hand, `spaces` maps free places -> items that the
    annotator could still take. Items with more free places than there are others stay for this annotator; for the rest,
    all draw on the same places, and who is slow will find fewer left. `hidden_share` of the items comes on top.
    """
    if mine is None:
        return None
    safe = held + sum(count for free, count in spaces.items() if free > len(others))
    contested = {free: count for free, count in spaces.items() if free <= len(others)}
    alone = safe + sum(contested.values())
    together = safe + sum(free * count for free, count in contested.items())
    hours = min(alone / mine, max(safe / mine, together / (mine + sum(others))))
    return 60 * hours * (1 + hidden_share)

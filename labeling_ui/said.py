"""What an annotator may say about an item, checked, and turned from places on the page into stored order and back.

The page counts places from 0, in the order in which it shows the completions; the store keeps everything in the order
in which the completions lie there. Whatever a page let through is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf.types import DataError

T = TypeVar("T")

FLAGS = {
    "unclear": "The prompt is unclear",
    "all_bad": "All completions are bad",
    "cannot_judge": "I cannot judge this",
    "unsafe": "Something here is unsafe",
}
"""What an annotator may say about an item, and how the page words it."""

UNRANKED = ("all_bad", "cannot_judge")
"""With one of these, nothing needs to be ranked."""

MAX_RATIONALE, MAX_NOTE = 4000, 1000
"""Characters."""

RATINGS = range(1, 6)

Tiers = Sequence[Sequence[int]]
"""Places on the page, from 0, best tier first; places in one tier are tied."""


@dataclass(frozen=True)
class Said:
    """A ranking in the annotator's own terms: places on the page."""

    tiers: tuple[tuple[int, ...], ...]
    aside: tuple[int, ...]
    flags: dict[str, Any]
    """As they were sent: `note` and `ratings` among them, ratings by place."""
    rationale: str | None


def as_said(ranks: Sequence[int | None], flags: Mapping[str, Any], rationale: str | None, order: Sequence[int]) -> Said:
    """Stored ranks and flags as the page shows them; `order` lists the indices of the completions as shown."""
    shown = [ranks[index] for index in order]
    levels = sorted({rank for rank in shown if rank is not None})
    tiers = tuple(tuple(place for place, rank in enumerate(shown) if rank == level) for level in levels)
    aside = tuple(place for place, rank in enumerate(shown) if rank is None)
    ratings = {name: [given[index] for index in order] for name, given in flags.get("ratings", {}).items()}
    return Said(tiers, aside, {**flags, "ratings": ratings} if ratings else dict(flags), rationale)


def checked_ranks(
    tiers: Tiers, aside: Sequence[int], order: Sequence[int], *, all_aside: bool = False
) -> tuple[int | None, ...]:
    """Ranks in stored order; raises DataError unless every place is used once and two are ranked.

    With `all_aside`, everything may be set aside.
    """
    placed = [place for tier in tiers for place in tier]
    used = [*placed, *aside]
    if any(isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(order) for place in used):
        raise DataError(f"places {used} are not those of {len(order)} completions")
    if sorted(used) != list(range(len(order))):
        raise DataError("rank each completion once, or set it aside")
    if len(placed) < 2 and not (all_aside and not placed):
        raise DataError("rank at least two completions, or skip the task")
    ranks: dict[int, int] = {}
    for rank, tier in enumerate((tier for tier in tiers if tier), start=1):
        ranks.update(dict.fromkeys(tier, rank))
    return tuple(stored(ranks, order))


def stored(by_place: Mapping[int, T], order: Sequence[int]) -> list[T | None]:
    """What belongs to places on the page, in the order of the completions as stored; None where nothing does."""
    return [by_place.get(place) for _, place in sorted((index, place) for place, index in enumerate(order))]


def checked_flags(flags: Mapping[str, Any], criteria: Sequence[str], order: Sequence[int]) -> dict[str, Any]:
    """The flags that were raised, with the note and the ratings in stored order. Raises DataError."""
    if unknown := set(flags) - {*FLAGS, "note", "ratings"}:
        raise DataError(f"there is no flag {min(unknown)!r}; known are {', '.join((*FLAGS, 'note', 'ratings'))}")
    found: dict[str, Any] = {name: True for name in FLAGS if flags.get(name) is True}
    note = checked_text("note", flags.get("note"), MAX_NOTE)
    ratings = _checked_ratings(flags.get("ratings"), criteria, order)
    return found | ({"note": note} if note else {}) | ({"ratings": ratings} if ratings else {})


def _checked_ratings(ratings: Any, criteria: Sequence[str], order: Sequence[int]) -> dict[str, list[int | None]]:
    """Ratings in stored order; criteria without any rating are left out."""
    if not isinstance(ratings, Mapping | None):
        raise DataError(f"ratings are {ratings!r}, but they must be lists by criterion")
    found = {}
    for name, given in (ratings or {}).items():
        if name not in criteria:
            raise DataError(f"there is no criterion {name!r}; this round has {', '.join(criteria) or 'none'}")
        if not isinstance(given, Sequence) or len(given) != len(order):
            raise DataError(f"the ratings for {name!r} must be a list of {len(order)}, one for each completion")
        for each in given:
            if each is not None and (type(each) is not int or each not in RATINGS):
                raise DataError(f"a rating for {name!r} is {each!r}, but it must be 1 to 5, or null")
        if any(each is not None for each in given):
            found[name] = stored(dict(enumerate(given)), order)
    return found


def checked_text(name: str, text: Any, limit: int) -> str | None:
    """A text without spaces around it, and without what no database takes; None where it is empty. Raises DataError."""
    if text is not None and not isinstance(text, str):
        raise DataError(f"the {name} must be a text")
    if text is not None and len(text) > limit:
        raise DataError(f"the {name} has {len(text)} characters; {limit} are allowed")
    return (text or "").replace("\0", "").encode("utf-8", "replace").decode().strip() or None


def checked_seconds(seconds: float | None) -> float | None:
    """Seconds as a page measured them. Raises DataError."""
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise DataError(f"seconds is {seconds!r}, but it must be 0 or more")
    return seconds

"""A ranking as one types it: `B > A = D / C` puts B first, A and D on the next rank, and sets C aside."""

from __future__ import annotations

import re

from labeling_ui.said import Said, Tiers
from rlhf.types import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parsed(text: str, count: int) -> tuple[Tiers, tuple[int, ...]]:
    """Tiers of places and places set aside, of `count` completions. Raises DataError, saying what to write instead."""
    bare = re.sub(r"\s+", "", text or "").upper().replace(",", ">")
    ranked, _, aside = bare.partition("/")
    known = LETTERS[:count]
    if strange := set(bare) - {*known, *">=/"}:
        raise DataError(
            f"{min(strange)!r} is none of the cards {known[0]} to {known[-1]}: write, best first, B > A = C"
        )
    if not re.fullmatch(r"(\w([>=]\w)*)?", ranked) or "/" in aside:
        raise DataError("write one letter between two signs: > for better, = for equal, / before those set aside")
    used = re.findall(r"\w", bare)
    if twice := sorted({letter for letter in used if used.count(letter) > 1}):
        raise DataError(f"{', '.join(twice)} stands there twice")
    if missing := [letter for letter in known if letter not in used]:
        raise DataError(f"{', '.join(missing)} is missing: rank it, or set it aside after a slash, as in B > A / C")
    tiers = [[known.index(letter) for letter in tier.split("=")] for tier in ranked.split(">") if tier]
    return tiers, tuple(known.index(letter) for letter in re.findall(r"\w", aside))


def written(said: Said) -> str:
    """What somebody said, as one would type it."""
    ranked = " > ".join(" = ".join(LETTERS[place] for place in tier) for tier in said.tiers)
    aside = " ".join(LETTERS[place] for place in said.aside)
    return f"{ranked} / {aside}".strip() if aside else ranked

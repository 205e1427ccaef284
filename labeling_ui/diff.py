"""What two texts have in common, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

MAX_CHARACTERS = 20_000
"""Of each text; what follows is not compared."""

Piece = tuple[Literal["same", "gone", "new"], str]

_WORD = re.compile(r"(?:[\u3040-\u30ff\u3400-\u9fff]|\w+?(?=[\u3040-\u30ff\u3400-\u9fff])|\w+|[^\w\s])\s*|\s+")


def words(first: str, second: str) -> list[Piece]:
    """The pieces of both texts in reading order: `same` in both, `gone` only in the first, `new` only in the second.

    The `same` and `gone` pieces together are the first text, the `same` and `new` ones the second.
    """
    before, after = (_WORD.findall(text[:MAX_CHARACTERS]) for text in (first, second))
    pieces: list[Piece] = []
    gone = new = ""
    # autojunk (the default) bounds the time for texts that repeat a few words; such words still match beside others.
    codes = SequenceMatcher(None, before, after).get_opcodes()
    for index, (kind, a, b, c, d) in enumerate(codes):
        if kind == "equal" and not _chance(codes, index):
            pieces += _changed(gone, new)
            pieces.append(("same", "".join(before[a:b])))
            gone = new = ""
        else:
            gone, new = gone + "".join(before[a:b]), new + "".join(after[c:d])
    return pieces + _changed(gone, new)


def _changed(gone: str, new: str) -> list[Piece]:
    pieces: tuple[Piece, ...] = (("gone", gone), ("new", new))
    return [piece for piece in pieces if piece[1]]


def _chance(codes: Sequence[tuple[str, int, int, int, int]], index: int) -> bool:
    """Whether words in common stand between changes so much longer that they tell nothing, such as a lone "the"."""
    if not 0 < index < len(codes) - 1:
        return False
    _, start, end, _, _ = codes[index]
    around = [max(b - a, d - c) for _, a, b, c, d in (codes[index - 1], codes[index + 1])]
    return 3 * (end - start) <= min(around)

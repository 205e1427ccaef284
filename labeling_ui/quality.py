"""Was this ranked with care? Gold items, what annotators say of the same item twice, and rankings that came too fast.

Nothing here refuses a ranking or leaves one out: it is noticed, and a researcher decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from labeling_ui.hidden import GOLD_ROUND
from rlhf.data import prompt_key
from rlhf.event_log import add_event
from rlhf.judgements import GOLD, REPEAT, TASK
from rlhf.rankings import read_rankings
from rlhf.schema import gold, items
from rlhf.store import Store
from rlhf.types import Completion, DataError, Prompt, Ranking, prompt_text

TOO_FAST = "too_fast"
"""The mark of a ranking that was given sooner than its item could be read."""

Pair = tuple[Ranking, Ranking]
"""What was said of an item, and what it is held against."""


# ---------------------------------------------------------------------------------------------------- too fast


def words(prompt: Prompt, completions: Iterable[str]) -> int:
    """Words between spaces that an annotator has before them."""
    return sum(len(text.split()) for text in (prompt_text(prompt), *completions))


def time_taken(reported: float | None, shown_at: float | None, now: float) -> float | None:
    """Seconds an annotator spent on an item: what the page reported, but never more than has passed since the hand-out.

    The page knows of pauses, which the server does not; the server's clock is beyond the page's reach. Without a
    report it is the time since the hand-out, and None where neither is known.
    """
    known = [
        seconds for seconds in (reported, None if shown_at is None else max(now - shown_at, 0.0)) if seconds is not None
    ]
    return min(known, default=None)


def is_too_fast(seconds: float | None, word_count: int, words_per_second: float | None) -> bool:
    """Whether so many words cannot be read in this time; no speed means that nothing is too fast."""
    return seconds is not None and words_per_second is not None and seconds < word_count / words_per_second


# ---------------------------------------------------------------------------------------------------- gold items


def import_gold(store: Store, path: str | Path) -> int:
    """Take the items of a rankings file whose `ranks` are known to be right; returns how many the file has.

    The rationale explains the answer. The same file a second time changes nothing; a corrected answer replaces the old
    one. Raises DataError naming the line that cannot be used, or the item that has two answers.
    """
    found = read_rankings(path)
    if found.bad:
        raise DataError(f"{path}:{found.bad[0].line}: {found.bad[0].reason}")
    known: dict[int, Ranking] = {}
    for ranking in found.rankings:
        if len(ranking.levels) < 2:
            raise DataError(f"{path}: the gold item {_start(ranking)} puts nothing above anything: there is no answer")
        texts = [Completion(text, model="imported", seed=0) for text in ranking.completions]
        item_id = store.add_completions(ranking.prompt, texts, round=GOLD_ROUND)
        if known.setdefault(item_id, ranking).ranks != ranking.ranks:
            raise DataError(f"{path}: the gold item {_start(ranking)} is there twice, with different answers")
    with store.write() as connection:
        for item_id, ranking in known.items():
            _keep(connection, item_id, {"ranks": list(ranking.ranks), "explanation": ranking.rationale})
    return len(known)


def _keep(connection: sa.Connection, item_id: int, answer: dict[str, Any]) -> None:
    row = connection.execute(sa.select(gold).where(gold.c.item_id == item_id)).one_or_none()
    if row is None:
        connection.execute(sa.insert(gold).values(item_id=item_id, **answer))
    elif {"ranks": row.ranks, "explanation": row.explanation} == answer:
        return
    else:
        connection.execute(sa.update(gold).where(gold.c.item_id == item_id).values(answer))
    add_event(connection, "gold", item_id=item_id, **answer)


def _start(ranking: Ranking) -> str:
    return repr(prompt_text(ranking.prompt)[:60])


# ---------------------------------------------------------------------------------------------------- held against


def gold_pairs(store: Store) -> list[Pair]:
    """What annotators said of gold items, each with the known answer (a ranking by `gold`)."""
    with store.read() as connection:
        rows = connection.execute(sa.select(gold.c.ranks, items.c.prompt_key, items.c.id).join(items)).all()
    by_item = {item.id: item.completions for item in store.items(GOLD_ROUND)}
    answers = {(row.prompt_key, tuple(each.text for each in by_item[row.id])): row.ranks for row in rows}
    said = store.rankings(kinds=(GOLD,))
    known = [tuple(answers[prompt_key(each.prompt), each.completions]) for each in said]
    return [(each, replace(each, annotator="gold", ranks=ranks)) for each, ranks in zip(said, known, strict=True)]


def repeat_pairs(store: Store, rounds: Sequence[int] | None = None) -> list[Pair]:
    """What annotators said of an item the first time, each with what the same annotator said the second time."""
    first = {_place(each): each for each in store.rankings(rounds=rounds, kinds=(TASK,), late=True)}
    again = store.rankings(rounds=rounds, kinds=(REPEAT,))
    return [(first[_place(each)], each) for each in again if _place(each) in first]


def _place(ranking: Ranking) -> tuple[object, ...]:
    return ranking.annotator, prompt_key(ranking.prompt), ranking.completions, ranking.round


@dataclass(frozen=True)
class Alike:
    """How much the two sides of pairs of rankings say the same."""

    share: float | None
    """Of the comparisons that both make, a tie against an order as half; None where there are none."""
    comparisons: int
    items: int


def alike(pairs: Sequence[Pair]) -> Alike:
    """Pairwise agreement of each ranking with the one it is held against."""
    credits = [credit for one, other in pairs for credit in _credits(one.ranks, other.ranks)]
    return Alike(sum(credits) / len(credits) if credits else None, len(credits), len(pairs))


def _credits(one: Sequence[int | None], other: Sequence[int | None]) -> list[float]:
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    outcomes = [(_outcome(a, c), _outcome(b, d)) for (a, b), (c, d) in combinations(both, 2)]
    return [x * y + (1 - x) * (1 - y) for x, y in outcomes]


def _outcome(first: int, second: int) -> float:
    return 0.5 if first == second else float(first < second)

"""From stored rankings to token ids: read, chosen by annotator, split by prompt, tokenised once.

A ranking of K completions is one element with K rows of prompt + completion + EOS: K forwards stand for all its
K (K - 1) / 2 comparisons. EOS stands at the end whether or not the completion was finished, and survives truncation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.data import is_held_out, prompt_key, read_preferences
from rlhf.rankings import read_rankings
from rlhf.soft_labels import SoftLabel, by_prompt, read_soft_labels
from rlhf.sources import numbered_rows
from rlhf.store import Store
from rlhf.text import encode_completion, encode_prompt
from rlhf.types import DataError, Ranking

STORE_FILES = (".db", ".sqlite", ".sqlite3")


@dataclass(frozen=True)
class EncodedRanking:
    """A ranking whose completions all differ, as token ids. `rows[i]` and `lengths[i]` belong to `completions[i]`."""

    ranking: Ranking
    rows: tuple[tuple[int, ...], ...]
    """Prompt + completion + EOS."""
    lengths: tuple[int, ...]
    """Tokens of the completion, EOS included."""
    soft: tuple[tuple[int, int, float, float], ...] = ()
    """(i, j, probability that i beats j, weight) of the pairs of ranked completions, where the labels are soft."""

    @property
    def ranked(self) -> list[int]:
        """Indices of the completions that were ranked; the others take no part in training."""
        return [i for i, rank in enumerate(self.ranking.ranks) if rank is not None]


@dataclass(frozen=True)
class Preferences:
    """Rankings to train on and to measure with; no prompt is in both."""

    train: list[EncodedRanking]
    held_out: list[EncodedRanking]
    left_out: dict[str, int]
    """Reason -> number of rankings."""


def load_rankings(
    source: str, *, columns: Mapping[str, str] | None = None, annotators: Sequence[str] | None = None
) -> tuple[list[Ranking], dict[str, int]]:
    """Rankings of a label store, a rankings file or preference pairs, and what was left out (reason -> count).

    Raises DataError where there are none, or none by these annotators.
    """
    rankings, left_out = _read(source, columns or {}, annotators)
    if not rankings:
        raise DataError(f"{source} holds no rankings yet: collect some with `rlhf label`")
    if annotators is None:
        return rankings, left_out
    chosen = [ranking for ranking in rankings if ranking.annotator in annotators]
    if not chosen:
        found = Counter(ranking.annotator for ranking in rankings)
        shown = ", ".join(f"{name} ({count})" for name, count in found.most_common(20))
        raise DataError(f"{source} holds no ranking by {' or '.join(annotators) or 'nobody'}, but by {shown}")
    return chosen, left_out


def load_soft_labels(source: str) -> list[SoftLabel]:
    """The labels of a file of soft labels; none where `source` is something else. Raises DataError."""
    if "://" in source or source.endswith(STORE_FILES):
        return []
    first = next((row for _, row in numbered_rows(source) if not isinstance(row, DataError)), {})
    return read_soft_labels(source) if "probability" in first else []


def _read(
    source: str, columns: Mapping[str, str], annotators: Sequence[str] | None
) -> tuple[list[Ranking], dict[str, int]]:
    if "://" in source or source.endswith(STORE_FILES):
        with closing(Store(source, create=False)) as store:  # an admin's last word on an item stands alone
            return store.rankings(annotators, resolved=True) or store.rankings(resolved=True), {}
    first = next((row for _, row in numbered_rows(source) if not isinstance(row, DataError)), {})
    if columns.get("chosen", "chosen") in first or columns.get("rejected", "rejected") in first:
        return read_preferences(source, columns), {}
    found = read_rankings(source, columns)
    bad = [f"line {row.line} of {Path(source).name}: {row.reason}" for row in found.bad]
    return found.rankings, dict.fromkeys(bad, 1)


def prepare(
    rankings: Sequence[Ranking],
    tokenizer: Any,
    *,
    held_out: float,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    ties_teach: bool,
    soft: Sequence[SoftLabel] = (),
) -> Preferences:
    """Tokenise and split by prompt. `ties_teach` keeps rankings that are one tie in training, too.

    With `soft` labels, `rankings` are their consensus, one a prompt, and all labels of a prompt are in its one element.

    Held-out rankings that are one tie are always kept: they count in the accuracy with ties as half.
    Raises DataError where nothing is left to train on.
    """
    train: list[EncodedRanking] = []
    measured: list[EncodedRanking] = []
    left_out: Counter[str] = Counter()
    labels = by_prompt(soft)
    for ranking in rankings:
        encoded = encode_ranking(ranking, tokenizer, max_completion_tokens=max_completion_tokens)
        if encoded is not None and labels:
            encoded = _softened(encoded, labels[prompt_key(ranking.prompt)])
        measures = is_held_out(ranking.prompt, held_out)
        reason = _unusable(encoded, max_prompt_tokens, needs_order=not (ties_teach or measures))
        if encoded is None or reason:
            left_out[reason] += 1
        else:
            (measured if measures else train).append(encoded)
    if not train:
        reasons = "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        held = f"{len(measured)} are of held-out prompts"
        raise DataError(
            f"nothing is left to train on: of {len(rankings)} rankings {held}{reasons}. Give more, or other limits"
        )
    return Preferences(train, measured, dict(left_out))


def encode_ranking(ranking: Ranking, tokenizer: Any, *, max_completion_tokens: int) -> EncodedRanking | None:
    """Token ids of a ranking; None where fewer than two different completions are ranked.

    Completions that are the same to the model become one. Copies that share their rank keep it; a text that was ranked
    at two places says nothing of itself and counts as not ranked. "The same" is after truncation: texts that differ
    only beyond the limit cannot be told apart.
    """
    prompt = encode_prompt(tokenizer, ranking.prompt)
    copies: dict[tuple[int, ...], list[int]] = {}
    for i, completion in enumerate(ranking.completions):
        ids = encode_completion(tokenizer, completion, max_tokens=max_completion_tokens)
        copies.setdefault(tuple(ids), []).append(i)
    seen = [{ranking.ranks[i] for i in places} for places in copies.values()]
    ranks = [places.pop() if len(places) == 1 else None for places in seen]
    if sum(rank is not None for rank in ranks) < 2:
        return None
    texts = [ranking.completions[places[0]] for places in copies.values()]
    return EncodedRanking(
        ranking=ranking if len(texts) == len(ranking.completions) else _without_copies(ranking, texts, ranks),
        rows=tuple((*prompt, *ids) for ids in copies),
        lengths=tuple(len(ids) for ids in copies),
    )


def _softened(encoded: EncodedRanking, labels: Sequence[SoftLabel]) -> EncodedRanking:
    """With the labels of its pairs; a text that truncation merged with another one has none."""
    place = {encoded.ranking.completions[i]: i for i in encoded.ranked}
    pairs = [
        (place[label.chosen], place[label.rejected], label.probability, label.weight)
        for label in labels
        if label.chosen in place and label.rejected in place and label.weight > 0
    ]
    return replace(encoded, soft=tuple(pairs))


def _without_copies(ranking: Ranking, texts: Sequence[str], ranks: Sequence[int | None]) -> Ranking:
    order = sorted({rank for rank in ranks if rank is not None})
    dense = tuple(None if rank is None else order.index(rank) + 1 for rank in ranks)
    return replace(ranking, completions=tuple(texts), ranks=dense, presented_order=None)


def _unusable(encoded: EncodedRanking | None, max_prompt_tokens: int, *, needs_order: bool) -> str:
    """Why a ranking cannot be used; empty where it can."""
    if encoded is None:
        return "fewer than two different completions are ranked"
    if len(encoded.rows[0]) - encoded.lengths[0] > max_prompt_tokens:
        return f"prompt longer than max_prompt_tokens = {max_prompt_tokens}"
    if needs_order and len(encoded.ranking.levels) < 2:
        return "one tie of all, from which Plackett-Luce learns nothing"
    return ""


def tie_strength(train: Sequence[EncodedRanking]) -> float:
    """Davidson's nu from the share t of tied pairs: nu / (2 + nu) = t, the estimate for completions of like quality.

    Half a tie is added, so that a held-out tie stays possible where training has none.
    """
    outcomes = [pair.outcome for encoded in train for pair in encoded.ranking.comparisons()]
    ties = outcomes.count(0.5)
    return 2 * (ties + 0.5) / (len(outcomes) - ties + 0.5)


def distinct_rows(rankings: Sequence[EncodedRanking]) -> list[tuple[int, ...]]:
    """Every (prompt, completion) once, ranked or not."""
    return list(dict.fromkeys(row for encoded in rankings for row in encoded.rows))

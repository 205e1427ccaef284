"""How well all annotators agree, corrected for chance, beside the published numbers; intervals bootstrap prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from labeling_ui.agreement import by_prompt, outcome, ranked_together
from labeling_ui.intervals import NOTHING, Floats, Rate, draw, estimate, ratio
from labeling_ui.reliability import (
    Level,
    Weights,
    alpha,
    coincidences,
    gwet_of_parts,
    gwet_parts,
    kendall_tau,
    kendall_w,
    midranks,
    w_significance,
)
from rlhf.data import prompt_key
from rlhf.types import Ranking

RATINGS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Concordance:
    """Agreement of all annotators. `Rate.pairs` counts what the line says."""

    kendall_tau: Rate
    """tau-b: mean over the pairs of annotators of a prompt, then over prompts. Counts pairs of annotators."""
    kendall_w: Rate
    """Mean over items of the completions that all of its annotators ranked, ties corrected. Counts items."""
    w_significance: float | None
    """Chance of a mean W as large if everybody ordered every item at random; by permutation."""
    alpha_ranks: Rate
    """Krippendorff's alpha, ordinal, of ranks: a unit is a completion of a prompt. Counts units that two ranked.

    Ranks of one prompt depend on each other: this is no alpha of a rating scale.
    """
    alpha_pairs: Rate
    """Krippendorff's alpha, nominal, of first, tie or second for pairs of completions. Counts pairs that two judged."""


def concordance(
    rankings: Iterable[Ranking], *, bootstrap: int = 2000, permutations: int = 1000, seed: int = 0
) -> Concordance:
    """All of it, over items that several annotators ranked; an annotator's last ranking of an item counts."""
    groups = [_one_each(group) for group in ranked_together(rankings)]
    tables = [_table(group) for group in groups]
    whole = [table for table in (table[:, np.isfinite(table).all(0)] for table in tables) if table.shape[1] > 1]
    prompts = len({prompt_key(group[0].prompt) for group in groups})
    draws = draw(prompts, bootstrap, seed)
    most = max((table.shape[1] for table in tables), default=0)
    if not groups:
        return Concordance(NOTHING, NOTHING, None, NOTHING, NOTHING)
    return Concordance(
        kendall_tau=_tau(groups, draws),
        kendall_w=_w(groups, tables, draws),
        w_significance=w_significance(whole, permutations=permutations, seed=seed),
        alpha_ranks=_alpha(groups, [_rank_units(table, most) for table in tables], "ordinal", draws),
        alpha_pairs=_alpha(groups, [_pair_units(group) for group in groups], "nominal", draws),
    )


def ratings_agreement(rankings: Iterable[Ranking], *, bootstrap: int = 2000, seed: int = 0) -> dict[str, Rate]:
    """Gwet's AC for what annotators say besides the ranks, by name; counts the units that several of them rated.

    AC1 for the flags that are yes or no (a flag that is not set says no), for items; AC2 with quadratic weights for
    criteria rated from 1 to 5, for completions.
    """
    groups = [_one_each(group) for group in ranked_together(rankings)]
    everything = [ranking.flags for group in groups for ranking in group]
    flags = sorted({name for each in everything for name, value in each.items() if isinstance(value, bool)})
    criteria = sorted({name for each in everything for name in each.get("ratings") or {}})
    draws = draw(len({prompt_key(group[0].prompt) for group in groups}), bootstrap, seed)
    found = {name: _gwet(groups, [_flag_units(group, name) for group in groups], "identity", draws) for name in flags}
    for name in criteria:
        units = [_rating_units(group, name) for group in groups]
        found[name] = _gwet(groups, units, "quadratic", draws)
    return found


def _one_each(group: Sequence[Ranking]) -> list[Ranking]:
    return list({ranking.annotator: ranking for ranking in group}.values())


def _table(group: Sequence[Ranking]) -> Floats:
    """(annotators, K) ranks, NaN where one is not ranked."""
    return np.array([[math.nan if rank is None else rank for rank in ranking.ranks] for ranking in group])


def _tau(groups: Sequence[Sequence[Ranking]], draws: Floats) -> Rate:
    parts = []
    for group in groups:
        found = [_tau_of(one, other) for one, other in combinations(group, 2)]
        known = [value for value in found if not math.isnan(value)]
        parts.append(np.array([sum(known), len(known)]))
    sums = by_prompt(groups, parts)
    means = np.stack([ratio(sums), np.ones(len(sums))], axis=1)
    means[sums[:, 1] == 0] = 0.0
    return estimate(means, ratio, draws, pairs=sums[:, 1].sum(), least=-1.0)


def _tau_of(one: Ranking, other: Ranking) -> float:
    both = [(a, b) for a, b in zip(one.ranks, other.ranks, strict=True) if a is not None and b is not None]
    return kendall_tau([a for a, _ in both], [b for _, b in both])


def _w(groups: Sequence[Sequence[Ranking]], tables: Sequence[Floats], draws: Floats) -> Rate:
    parts = []
    for table in tables:
        shared = table[:, np.isfinite(table).all(0)]
        value = float(kendall_w(shared)) if shared.shape[1] > 1 else math.nan
        parts.append(np.zeros(2) if math.isnan(value) else np.array([value, 1.0]))
    sums = by_prompt(groups, parts)
    return estimate(sums, ratio, draws, pairs=sums[:, 1].sum())


def _rank_units(table: Floats, most: int) -> Floats:
    """(K, categories) counts: the places, in halves, that each completion was given; ties share the mean of theirs.

    Of those that all of them ranked: to set one aside would move those below it, and is no disagreement on them.
    """
    shared = table[:, np.isfinite(table).all(0)]
    if shared.shape[1] < 2:
        return np.zeros((0, 2 * most + 1))
    units = np.zeros((shared.shape[1], 2 * most + 1))
    for row in shared:
        units[np.arange(len(row)), (2 * midranks(row)).astype(int)] += 1
    return units


def _pair_units(group: Sequence[Ranking]) -> Floats:
    """(pairs, 3) counts of second, tie, first; which text of a pair is the first, a hash decides, not their order."""
    texts = group[0].completions
    units = []
    for pair in combinations(range(len(texts)), 2):
        i, j = sorted(pair, key=lambda place: hashlib.sha256(texts[place].encode()).digest())
        said = [outcome(ranking.ranks[i], ranking.ranks[j]) for ranking in group]
        units.append([said.count(value) for value in (0.0, 0.5, 1.0)])
    return np.array(units, dtype=float)


def _alpha(groups: Sequence[Sequence[Ranking]], units: Sequence[Floats], level: Level, draws: Floats) -> Rate:
    compared = sum(int((each.sum(1) > 1).sum()) for each in units)
    sums = by_prompt(groups, [coincidences(each).sum(0) for each in units])
    return estimate(sums, partial(alpha, level=level), draws, pairs=compared, least=-1.0)


def _flag_units(group: Sequence[Ranking], name: str) -> Floats:
    raised = sum(bool(ranking.flags.get(name)) for ranking in group)
    return np.array([[len(group) - raised, raised]], dtype=float)


def _rating_units(group: Sequence[Ranking], name: str) -> Floats:
    units = np.zeros((len(group[0].completions), len(RATINGS)))
    for ranking in group:
        for unit, rating in zip(units, (ranking.flags.get("ratings") or {}).get(name) or (), strict=False):
            if rating in RATINGS:
                unit[RATINGS.index(rating)] += 1
    return units


def _gwet(groups: Sequence[Sequence[Ranking]], units: Sequence[Floats], weights: Weights, draws: Floats) -> Rate:
    sums = by_prompt(groups, [gwet_parts(each, weights) for each in units])
    compared = sum(int((each.sum(1) > 1).sum()) for each in units)
    return estimate(sums, partial(gwet_of_parts, weights=weights), draws, pairs=compared, least=-1.0)

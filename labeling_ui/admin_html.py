"""The admin page's numbers as HTML. Every text goes through `text`: names, prompts and notes may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import accumulate

from labeling_ui.admin import Disputed, People, Together
from labeling_ui.admin_charts import Whisker, bars, forest, histogram, whiskers
from labeling_ui.admin_parts import Cell, Counted, Opens, duration, empty, section, start, table, tiles
from labeling_ui.annotators import MEANING, AnnotatorReport
from labeling_ui.coverage import Overview
from labeling_ui.disputes import Case, Statement
from labeling_ui.intervals import Rate
from labeling_ui.letters import LETTERS, written
from labeling_ui.references import references
from labeling_ui.said import FLAGS
from rlhf.figures import chart, text
from rlhf.report_data import Line
from rlhf.types import Prompt

DAYS = 14
"""The last ones, in the chart of rankings per day."""


def queue(found: Overview) -> str:
    """Queue and coverage."""
    wanted = sum(each.wanted for each in found.coverage)
    done = sum(each.done for each in found.coverage)
    numbers = [
        ("ranked", f"{done:,}", f"of {wanted:,} wanted"),
        ("in hand", f"{found.held_count:,}", f"{found.expired:,} past their lease"),
        ("per hour", "-" if found.per_hour is None else f"{found.per_hour:,.0f}", "in the last 15 minutes"),
        ("time left", duration(found.minutes_left), "at this pace"),
        ("skipped", f"{found.skipped:,}", "put away unranked"),
        ("late", f"{found.late:,}", "came after their place was taken"),
        ("too fast", f"{found.too_fast:,}", "quicker than one reads"),
        ("adjudicated", f"{found.adjudicated:,}", "items with a last word"),
    ]
    coverage = [
        (each.round, each.overlap, each.items, each.complete, each.wanted, each.done, each.in_hand, each.free)
        for each in found.coverage
    ]
    held = [
        (each.annotator, f"#{each.item_id}", duration(each.minutes), "run out" if each.expired else "runs")
        for each in found.held
    ]
    flagged = [
        (f"#{each.item_id}", each.annotator, ", ".join(each.flags), each.note or "", each.at.replace("T", " ")[:16])
        for each in found.flagged
    ]
    counts = ", ".join(f"{FLAGS.get(name, 'with a note').lower()}: {count}" for name, count in found.flags.items())
    heads = ("round", "wanted per item", "items", "complete", "rankings wanted", "done", "in hand", "free")
    return (
        tiles(numbers)
        + f'<div class="charts">{_growth(found, wanted)}{_days(found.days)}</div>'
        + section("Coverage", table(heads, coverage, none="There is nothing to rank yet."))
        + section("In hand", table(("annotator", "item", "for", "lease"), held, none="Nobody holds an item."))
        + section(
            "Flagged",
            (f"<p>{text(counts)}</p>" if counts else "")
            + table(("item", "annotator", "flags", "note", "when (UTC)"), flagged, none="Nothing was flagged."),
        )
    )


def agreement(found: Together) -> str:
    """Agreement of all, beside what others have measured."""
    if not found.items:
        return empty("No item has been ranked by two annotators yet, so nothing is known about agreement.")
    both, more = found.agreement, found.concordance
    chance = "-" if more.w_significance is None else f"{more.w_significance:.3f}"
    rows: list[tuple[str, Rate, str, str]] = [
        ("Pairwise agreement, ties left out", both.without_ties, "pairs", "comparable with the published numbers"),
        ("Pairwise agreement, a tie as half", both.ties_as_half, "pairs", "as if a coin had broken each tie"),
        ("Kendall's tau-b", more.kendall_tau, "pairs of annotators", "1: the same order; 0: none in common"),
        ("Kendall's W", more.kendall_w, "items", f"chance of one as large at random: {chance}"),
        ("Krippendorff's alpha of ranks", more.alpha_ranks, "completions", "ordinal; 0: as by chance"),
        ("Krippendorff's alpha of pairs", more.alpha_pairs, "pairs", "nominal: first, tie, second"),
        *((f"Gwet's AC of “{name}”", rate, "units", "0: as by chance") for name, rate in found.ratings.items()),
    ]
    shown = [(name, Counted(rate, unit), note) for name, rate, unit, note in rows]
    published = [
        (
            each.name,
            f"{each.value:.3f}" + (f" ± {each.spread:.3f}" if each.spread else ""),
            each.source + " (second hand)" * each.second_hand,
        )
        for each in references("pairwise")
    ]
    ties = "" if found.tie_share is None else f" {100 * found.tie_share:.0f} % of compared pairs are ties."
    return (
        f"<p>{found.rankings:,} rankings by {found.annotators} annotators; {found.items:,} items were ranked by more "
        f"than one.{ties}</p>"
        f'<div class="charts">{_beside(both.without_ties)}{_places(found.wins_by_place)}</div>'
        + section("This round", table(("measure", "value", "how to read it"), shown))
        + section("Published pairwise agreement", table(("who", "agreement", "source"), published))
    )


def annotators(found: People, paused: Mapping[str, bool]) -> str:
    """Each annotator's numbers; those to look into first."""
    reports = sorted(found.reports, key=lambda each: (not each.warnings, each.reliability.value or 1.0, each.name))
    if not reports:
        return empty("Nobody has ranked anything yet.")
    heads = (
        *("annotator", "rankings", "agreement", "reliability", "position bias", "self-consistency", "gold"),
        *("median seconds", "too fast"),
    )
    rows = [_report(each, paused.get(each.name, False)) for each in reports]
    plots = [
        forest(
            "Reliability",
            whiskers([(each.name, each.reliability) for each in reports]),
            label="chance to order two completions right",
            reference=0.5,
            note="By the rater model; 0.5 is guessing.",
        ),
        forest(
            "Position bias",
            whiskers([(each.name, each.position_bias) for each in reports]),
            label="logits per place",
            reference=0.0,
            note="Above 0: prefers what stands further up.",
            least=0.4,
        ),
        forest(
            "Agreement with the others",
            whiskers([(each.name, each.agreement.without_ties) for each in reports]),
            label="share of pairs, ties left out",
            reference=0.5,
        ),
        forest(
            "Median time",
            whiskers([(each.name, each.median_seconds) for each in reports]),
            label="seconds",
        ),
        histogram(
            "Time per ranking",
            [value for values in found.seconds.values() for value in values],
            label="seconds",
            note="Of all annotators; the slowest twentieth is gathered at the right.",
        ),
    ]
    concerns = "".join(_concern(each) for each in reports if each.warnings)
    return (
        (f'<ul class="concerns">{concerns}</ul>' if concerns else "")
        + table(heads, rows)
        + '<p class="note">Below each number its 95 % interval, and how many pairs of completions, or rankings, it '
        "rests on; - where they are too few to judge anybody.</p>" + f'<div class="charts">{"".join(plots)}</div>'
    )


def disputes(found: Sequence[Disputed]) -> str:
    """The list of items on which annotators differ."""
    rows = [
        (
            Opens(each.item_id),
            start(each.prompt),
            each.annotators,
            each.doubt,
            each.disagreement,
            each.adjudicated_by or "",
        )
        for each in found
    ]
    heads = ("item", "prompt", "annotators", "doubt (bits)", "disagreement", "adjudicated by")
    return table(heads, rows, none="No two annotators differ on an item yet.") + (
        '<p class="note">Doubt is what the annotators\' difference leaves open by the rater model, in bits per pair of '
        "completions: a random clicker against two careful people leaves little.</p>"
    )


def case(shown: Case) -> str:
    """A prompt and its cards, blind, as written."""
    cards = "".join(
        f'<article><h4>{letter}</h4><pre dir="auto">{text(completion)}</pre></article>'
        for letter, completion in zip(LETTERS, shown.completions, strict=False)
    )
    return f'<div class="prompt">{_prompt(shown.prompt)}</div><div class="cards">{cards}</div>'


def statements(found: Sequence[Statement]) -> str:
    """What stands on an item, in the adjudicator's letters."""
    rows = [
        (
            each.annotator + (" (adjudication)" if each.kind == "adjudication" else ""),
            written(each.said) or "-",
            ", ".join([*(name for name in FLAGS if each.said.flags.get(name)), *each.marks]),
            " ".join(part for part in (each.said.rationale, each.said.flags.get("note")) if part),
        )
        for each in found
    ]
    return table(("annotator", "ranking", "flags and marks", "in words"), rows, none="Nobody has ranked this item.")


# ------------------------------------------------------------------------------------------------ parts


def _report(each: AnnotatorReport, paused: bool) -> tuple[Cell, ...]:
    return (
        each.name + (" (paused)" if paused else ""),
        each.rankings,
        each.agreement.without_ties,
        each.reliability,
        each.position_bias,
        each.self_consistency,
        each.gold,
        each.median_seconds,
        each.too_fast,
    )


def _concern(report: AnnotatorReport) -> str:
    return f"<li><b>{text(report.name)}</b> {text('; '.join(MEANING[each] for each in report.warnings))}.</li>"


def _prompt(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return f'<pre dir="auto">{text(prompt)}</pre>'
    return "".join(
        f'<small>{text(turn["role"])}</small><pre dir="auto">{text(turn["content"])}</pre>' for turn in prompt
    )


def _beside(rate: Rate) -> str:
    ours = [Whisker(each.name, each.value, each.low, each.high) for each in whiskers([("this round", rate)])]
    others = [
        Whisker(
            each.source.partition(" (")[0].partition(",")[0].replace(" et al.", ""),
            each.value,
            each.value - (each.spread or 0),
            each.value + (each.spread or 0),
        )
        for each in references("pairwise")
    ]
    quiet = [Whisker(each.name, each.value, each.low, each.high, quiet=True, note="published") for each in others]
    return forest(
        "Agreement beside published numbers",
        [*ours, *quiet],
        label="pairwise agreement, ties left out",
        reference=0.5,
        note="0.5 is chance. Who agreed with whom differs: see the table below.",
    )


def _places(wins: Sequence[float | None]) -> str:
    places = tuple(float(place) for place in range(1, len(wins) + 1))
    lines = [Line("won", places, tuple(wins)), Line("if the place did not matter", places, (0.5,) * len(places))]
    return chart("Does the place on the page matter?", "place", lines, y_label="share of comparisons won")


def _growth(found: Overview, wanted: int) -> str:
    """Rankings so far against those wanted; nothing within the first hour."""
    hours = [(at, count) for hour, count in found.hours if (at := _hour(hour)) is not None]
    if len(hours) < 2:
        return ""
    times = tuple((at - hours[0][0] + 3600) / 86400 for at, _ in hours)  # an hour's rankings are there at its end
    counts = tuple(float(total) for total in accumulate(count for _, count in hours))
    lines = [Line("ranked", (0.0, *times), (0.0, *counts)), Line("wanted", (0.0, times[-1]), (float(wanted),) * 2)]
    return chart("Rankings so far", "days since the first", lines)


def _hour(text: str) -> float | None:
    """Unix time of an hour such as `2026-01-31T09`; None for what is none, as an imported ranking may have."""
    try:
        return datetime.fromisoformat(f"{text}:00+00:00").timestamp()
    except ValueError:
        return None


def _days(days: Sequence[tuple[str, int]]) -> str:
    return bars("Rankings per day", days[-DAYS:], label="day (UTC)")

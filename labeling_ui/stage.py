"""The label stage: people rank on the page, or simulated annotators rank in their place; then the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from labeling_ui import guidelines, quality
from labeling_ui.agreement import Agreement, Rate, agreement, tie_share, wins_by_place
from labeling_ui.assignment import Policy
from labeling_ui.quality import Alike, alike
from labeling_ui.raters import write_labels
from labeling_ui.service import LabelService
from labeling_ui.simulate import simulate
from rlhf.config import LabelConfig
from rlhf.data import write_rankings
from rlhf.database import shown
from rlhf.judgements import LATE
from rlhf.progress import progress, quiet, say
from rlhf.report_data import Fact, Line, Plot, ReportData, Table, write_report_data
from rlhf.run_folder import write_json
from rlhf.soft_labels import SOFT_LABELS
from rlhf.stopping import StopRequest, stop_request
from rlhf.store import Store
from rlhf.tracking import Tracker
from rlhf.types import DataError

RANKINGS, SUMMARY = "rankings.jsonl", "label.json"


@dataclass(frozen=True)
class LabelResult:
    """What the rankings of a round look like."""

    rankings: int
    items: int
    annotators: dict[str, int]
    agreement: Agreement
    tie_share: float | None
    """Share of compared pairs that are ties."""
    wins_by_place: list[float | None]
    """Share of comparisons won at each place on the page; 0.5 everywhere means that the place does not matter."""
    content_hash: str
    path: Path
    """The exported rankings."""
    marks: dict[str, int] = field(default_factory=dict)
    """What the server noticed -> of how many rankings, those that came too late included."""
    gold: Alike | None = None
    """How well gold items were answered; None where none was ranked."""
    repeats: Alike | None = None
    """How much annotators said the same of an item the second time; None where none was repeated."""


def run(config: LabelConfig) -> LabelResult:
    """Collect rankings for a round and write `rankings.jsonl`, `label.json` and the report's numbers into the output.

    With `simulate`, annotators of known utility rank until nothing is left; without, the page is served until it is
    interrupted. Raises DataError where the store is missing or has nothing to rank.
    """
    # of Ctrl-C while a connection closes, SQLAlchemy would make a traceback, or nothing
    watch = stop_request() if config.simulate else nullcontext(StopRequest())
    with watch as stop, closing(Store(config.store, create=False)) as store:
        if not store.items(config.round):
            raise DataError(f"{config.store} has nothing to rank in round {config.round}: run `rlhf sample` first")
        service = _service(store, config)
        if config.simulate is None:
            _serve(service, config)
        else:
            with progress("label", total=service.wanted()) as bar:
                simulate(service, config.simulate, bar, stop)
        return _conclude(store, config)


def _service(store: Store, config: LabelConfig) -> LabelService:
    """The service that a configuration describes; gold items and guidelines are in the store then.

    Simulated annotators have read no guidelines and are as quick as they like.
    """
    person = config.simulate is None
    guidelines.publish(store, config.guideline_version, config.guidelines, config.quiz)
    if config.gold is not None:
        quality.import_gold(store, config.gold)
    policy = Policy(
        overlap=config.overlap,
        overlap_share=config.overlap_share,
        round=config.round,
        seed=config.seed,
        lease_seconds=60 * config.lease_minutes,
        gold_rate=config.gold_rate,
        repeat_rate=config.repeat_rate,
    )
    return LabelService(
        store,
        policy,
        guideline_version=config.guideline_version,
        criteria=config.criteria,
        words_per_second=config.words_per_second if person else None,
        edit_minutes=config.edit_minutes,
        quiz=person,
    )


def _serve(service: LabelService, config: LabelConfig) -> None:
    """Open the page until Ctrl-C."""
    quiet()
    from labeling_ui import app

    place = shown(config.store) if "://" in config.store else Path(config.store).resolve()
    kept = f"rankings are kept in {place}; Ctrl-C ends"
    who = "" if config.accounts else f" as {config.annotator!r}"
    with suppress(KeyboardInterrupt):  # the way to end it: the numbers follow
        app.serve(service, config, lambda address: say(f"rank at {address}{who}; {kept}"))


def _conclude(store: Store, config: LabelConfig) -> LabelResult:
    rankings = store.rankings(rounds=[config.round])
    every = store.rankings(rounds=[config.round], late=True)
    output = Path(config.output)
    resolved = store.rankings(rounds=[config.round], resolved=True)  # for training; the numbers are of what they said
    write_rankings(output / RANKINGS, resolved)
    write_labels(output / SOFT_LABELS, resolved, gold=quality.gold_pairs(store))
    counts: dict[str, int] = {}
    for ranking in rankings:
        counts[ranking.annotator] = counts.get(ranking.annotator, 0) + 1
    result = LabelResult(
        rankings=len(rankings),
        items=len({(repr(ranking.prompt), ranking.completions) for ranking in rankings}),
        annotators=dict(sorted(counts.items())),
        agreement=agreement(rankings, seed=config.seed),
        tie_share=tie_share(rankings),
        wins_by_place=wins_by_place(rankings),
        content_hash=store.content_hash(),
        path=output / RANKINGS,
        marks=dict(sorted(Counter(mark for each in every for mark in each.flags.get("marks", [])).items())),
        gold=_alike(quality.gold_pairs(store)),
        repeats=_alike(quality.repeat_pairs(store, [config.round])),
    )
    with Tracker(output, stage="label", config=config, tracking=config.tracking) as tracker:
        tracker.log(_metrics(result), step=result.rankings)
        write_report_data(output, _report_data(result, config))
        write_json(output / SUMMARY, _as_json(result, config))
    say(f"label: {_sentence(result, config)}")
    return result


def _alike(pairs: Sequence[quality.Pair]) -> Alike | None:
    return alike(pairs) if pairs else None


def _as_json(result: LabelResult, config: LabelConfig) -> dict[str, Any]:
    return asdict(result) | {"path": RANKINGS, "simulated": config.simulate is not None, "round": config.round}


def _sentence(result: LabelResult, config: LabelConfig) -> str:
    rate = result.agreement.without_ties
    agreed = "no item was ranked twice, so agreement is unknown"
    if rate.value is not None:
        agreed = f"agreement {rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f}, ties left out)"
    who = f"{len(result.annotators)} {'simulated ' if config.simulate else ''}annotators"
    return f"{result.rankings} rankings of {result.items} items by {who}; {agreed}"


def _metrics(result: LabelResult) -> dict[str, float]:
    numbers = {
        "rankings": result.rankings,
        "items": result.items,
        "annotators": len(result.annotators),
        "agreement": result.agreement.without_ties.value,
        "agreement_ties_as_half": result.agreement.ties_as_half.value,
        "tie_share": result.tie_share,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _report_data(result: LabelResult, config: LabelConfig) -> ReportData:
    found = result.agreement
    pairs = f"{found.without_ties.pairs} pairs of completions in {found.items} items ranked more than once"
    places = range(1, len(result.wins_by_place) + 1)
    wins = Line("won", tuple(map(float, places)), tuple(result.wins_by_place))
    return ReportData(
        title="Rankings and agreement",
        verdict=f"{_sentence(result, config)}.",
        facts=(
            Fact("Rankings", result.rankings),
            Fact("Items (a prompt with its completions)", result.items),
            _fact("Agreement, ties left out", found.without_ties, pairs),
            _fact("Agreement, a tie as half", found.ties_as_half, f"{found.ties_as_half.pairs} pairs"),
            Fact("Share of compared pairs that are ties", result.tie_share),
            *_care(result),
        ),
        plots=(
            Plot(
                "Does the place on the page matter?",
                "place",
                "share of comparisons won",
                (wins,),
                note="0.5 everywhere means that it does not.",
            ),
        ),
        tables=(Table("Rankings by annotator", ("annotator", "rankings"), tuple(result.annotators.items())),),
    )


def _care(result: LabelResult) -> list[Fact]:
    """What tells of the care with which people ranked, as far as there is anything to tell."""
    facts = [Fact(_MARKS.get(mark, mark), count) for mark, count in result.marks.items()]
    for name, found in (("Gold items answered as known", result.gold), ("The same, when shown again", result.repeats)):
        if found is not None:
            note = f"{found.comparisons} pairs of completions in {found.items} rankings; a tie counts half"
            facts.append(Fact(name, found.share, note=note, reference=0.5))
    return facts


_MARKS = {
    LATE: "Rankings that came after enough others (left out)",
    quality.TOO_FAST: "Rankings given too fast to read",
}


def _fact(name: str, rate: Rate, note: str) -> Fact:
    return Fact(name, rate.value, rate.low, rate.high, note=note, reference=0.5)

"""What an evaluation says, for a person: a table of two policies, one sentence, the report's plots. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.report_data import Fact, Line, Plot, ReportData, Table

FILE = "evaluation.json"
"""What `rlhf.evaluation` leaves: its `Evaluation` as nested plain values."""

Record = Mapping[str, Any]


def report_data(evaluation: Record) -> ReportData:
    """The evaluation's part of the report, from what `evaluation.json` holds."""
    return ReportData(
        title="Evaluation on held-out prompts",
        verdict=verdict(evaluation),
        facts=(
            _fact("Win rate over the baseline", evaluation["win_rate"], "ties count half", reference=0.5),
            _fact("KL to the baseline (nats per sequence)", evaluation["kl"], reference=0.0),
        ),
        plots=(_score_against_kl(evaluation),),
        tables=(table(evaluation),),
    )


def verdict(evaluation: Record) -> str:
    """One sentence on who wins, uncertainty included."""
    rate, kl = evaluation["win_rate"], evaluation["kl"]
    sizes = f"{evaluation['prompts']} held-out prompts, {evaluation['samples_per_prompt']} samples each"
    if rate["low"] > 0.5:
        who = "The policy beats the baseline"
    elif rate["high"] < 0.5:
        who = "The policy loses to the baseline"
    else:
        who = "Neither is shown to be better"
    interval = f"{rate['value']:.1%} of comparisons won (95 % interval {rate['low']:.1%} to {rate['high']:.1%})"
    return f"{who}: {interval} at a KL of {kl['value']:.2f} nats, on {sizes}."


def table(evaluation: Record) -> Table:
    """Baseline, policy and best-of-n side by side."""
    baseline, policy, best = evaluation["baseline"], evaluation["policy"], evaluation["best_of_n"][-1:]
    columns = ("", "baseline", "policy", *(f"best of {each['n']}" for each in best))

    def row(name: str, key: str, of_best: str | None = None) -> tuple[str, ...]:
        cells = (_shown(side[key]) for side in (baseline, policy))
        return (name, *cells, *(_shown(each[of_best]) if of_best else "" for each in best))

    rows = (
        row("score (reward)", "score", "score"),
        row("judged", "judged", "judged"),
        ("win rate", "0.5", _shown(evaluation["win_rate"]), *("" for _ in best)),
        ("KL (nats)", "0", _shown(evaluation["kl"]), *(f"at most {each['kl']:.2f}" for each in best)),
        row("length (tokens)", "length"),
        row("ended by itself", "eos_rate"),
        row("distinct-2", "distinct2"),
    )
    note = "95 % intervals from a bootstrap over prompts; best-of-n draws from the baseline and picks by the reward"
    return Table("Policy against baseline", columns, rows, note)


def _shown(number: float | Record | None) -> str:
    """`0.31`, or `0.31 (0.25 to 0.37)` for an estimate; nothing for what could not be computed."""
    if isinstance(number, Mapping):
        if number["value"] is None:
            return ""
        return f"{_digits(number['value'])} ({_digits(number['low'])} to {_digits(number['high'])})"
    return "" if number is None else _digits(number)


def _digits(number: float) -> str:
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.3f}"


def _fact(name: str, estimate: Record, note: str = "", *, reference: float) -> Fact:
    return Fact(name, estimate["value"], estimate["low"], estimate["high"], note, reference)


def _score_against_kl(evaluation: Record) -> Plot:
    """Over-optimisation at a glance: how much score a policy has for its distance, beside what best-of-n gets."""
    best = evaluation["best_of_n"]
    baseline, policy = evaluation["baseline"]["judged"], evaluation["policy"]["judged"]
    lines = (
        Line(
            "best of n from the baseline",
            (0.0, *(each["kl"] for each in best)),
            (baseline["value"], *(each["judged"] for each in best)),
            labels=("baseline", *(f"n = {each['n']}" for each in best)),
        ),
        Line(
            "policy", (evaluation["kl"]["value"],), (policy["value"],), ("policy",), (policy["low"],), (policy["high"],)
        ),
    )
    return Plot("Judged score against distance", "KL to the baseline (nats)", "judged score", lines)

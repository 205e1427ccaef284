"""What an evaluation says, for a person: a table of two policies, one sentence, the report's plots. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            _fact("Win rate over the baseline", evaluation["win_rate"], "a tie counts half", reference=0.5),
            _fact("KL to the baseline, nats per completion", evaluation["kl"], reference=0.0),
        ),
        plots=(_against_kl(evaluation, "judged"), _against_kl(evaluation, "score")),
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
    won, low, high = (f"{100 * rate[name]:.1f}" for name in ("value", "low", "high"))
    interval = f"{won} % of comparisons won (95 % interval {low} to {high} %)"
    return f"{who}: {interval} at a KL of {kl['value']:.2f} nats per completion, on {sizes}."


def table(evaluation: Record) -> Table:
    """Baseline, policy and best-of-n side by side."""
    baseline, policy, best = evaluation["baseline"], evaluation["policy"], _worth_showing(evaluation["best_of_n"])
    columns = ("", "baseline", "policy", *(f"best of {each['n']}" for each in best))

    def row(name: str, key: str, of_best: str | None = None) -> tuple[str, ...]:
        cells = (_shown(side[key]) for side in (baseline, policy))
        return (name, *cells, *(_shown(each[of_best]) if of_best else "" for each in best))

    rows = (
        row("score (reward model)", "score", "score"),
        row("judged score", "judged", "judged"),
        ("win rate", "0.5", _shown(evaluation["win_rate"]), *("" for _ in best)),
        ("KL (nats)", "0", _shown(evaluation["kl"]), *(f"at most {each['kl']:.2f}" for each in best)),
        (
            "judged gain per nat",
            "",
            _gain_per_nat(evaluation, evaluation["policy"]["judged"]["value"], evaluation["kl"]["value"]),
            *(_gain_per_nat(evaluation, each["judged"], each["kl"]) for each in best),
        ),
        row("length (tokens)", "length"),
        row("ended by itself", "eos_rate"),
        row("distinct-2", "distinct2"),
    )
    note = "95 % intervals from a bootstrap over prompts; best-of-n draws from the baseline and picks by the reward."
    return Table("Policy against baseline", columns, rows, note)


def _worth_showing(best: Sequence[Record]) -> list[Record]:
    """Best of 4, as many can afford, and the best of most."""
    return [each for each in best if each["n"] == 4 or each is best[-1]]


def _gain_per_nat(evaluation: Record, judged: float, kl: float) -> str:
    """What each nat of distance bought; nothing where there is next to no distance."""
    return f"{(judged - evaluation['baseline']['judged']['value']) / kl:.3f}" if kl >= 0.05 else ""


def _shown(number: float | Record | None) -> str:
    """`0.31`, or `0.31 (0.25 to 0.37)` for an estimate; nothing for what could not be computed."""
    if isinstance(number, Mapping):
        if number["value"] is None or number["low"] is None:
            return _shown(number["value"])
        return f"{_digits(number['value'])} ({_digits(number['low'])} to {_digits(number['high'])})"
    return "" if number is None else _digits(number)


def _digits(number: float) -> str:
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.3f}"


def _fact(name: str, estimate: Record, note: str = "", *, reference: float) -> Fact:
    return Fact(name, estimate["value"], estimate["low"], estimate["high"], note, reference)


TITLES = {"judged": "Judged score against KL", "score": "Reward against KL"}


def _against_kl(evaluation: Record, kind: str) -> Plot:
    """How much score a policy has for its distance, beside what best-of-n gets: of the reward, or of the judge.

    Where the reward rises and the judge's score does not, the policy has learned the reward model's mistakes.
    """
    best = evaluation["best_of_n"]
    baseline, policy = evaluation["baseline"][kind], evaluation["policy"][kind]
    low, high = (() if policy[end] is None else (policy[end],) for end in ("low", "high"))
    lines = (
        Line(
            "best of n from the baseline",
            (0.0, *(each["kl"] for each in best)),
            (baseline["value"], *(each[kind] for each in best)),
            labels=("baseline", *(f"n = {each['n']}" for each in best)),
        ),
        Line("policy", (evaluation["kl"]["value"],), (policy["value"],), ("policy",), low, high),
    )
    y_label = "mean judged score" if kind == "judged" else "mean score of the reward model"
    return Plot(TITLES[kind], "KL to the baseline, nats per completion", y_label, lines)

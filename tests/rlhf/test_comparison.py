"""The evaluation in words: the sentence follows the interval, and every number stands where a reader looks for it."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf import comparison, figures
from rlhf.report_data import ReportData


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def evaluation(win_rate: dict[str, float]) -> dict[str, Any]:
    side = {"score": estimate(0.01, -0.1, 0.12), "judged": estimate(0.2, 0.1, 0.3), "eos_rate": 0.97, "distinct2": 0.5}
    return {
        "prompts": 256,
        "samples_per_prompt": 2,
        "policy": side | {"length": estimate(17.25, 16, 18)},
        "baseline": side | {"length": estimate(16.5, 16, 17), "distinct2": None},
        "win_rate": win_rate,
        "kl": estimate(3.217, 3.1, 3.3),
        "best_of_n": [
            {"n": 2, "kl": 0.193, "score": 0.5, "judged": 0.35},
            {"n": 4, "kl": 0.636, "score": 0.9, "judged": 0.45},
        ],
    }


@pytest.mark.parametrize(
    ("rate", "sentence"),
    [
        (
            estimate(0.655, 0.61, 0.7),
            "The policy beats the baseline: 65.5 % of comparisons won (95 % interval 61.0 to 70.0 %)",
        ),
        (estimate(0.52, 0.47, 0.57), "Neither is shown to be better: 52.0 %"),
        (estimate(0.5, 0.5, 0.5), "Neither is shown to be better: 50.0 %"),
        (estimate(0.3, 0.25, 0.4), "The policy loses to the baseline: 30.0 %"),
    ],
)
def test_the_sentence_claims_no_more_than_the_interval(rate: dict[str, float], sentence: str) -> None:
    said = comparison.verdict(evaluation(rate))
    assert said.startswith(sentence)
    assert said.endswith("at a KL of 3.22 nats per completion, on 256 held-out prompts, 2 samples each.")


def test_the_table_holds_both_policies_and_the_best_of_n() -> None:
    table = comparison.table(evaluation(estimate(0.655, 0.61, 0.7)))
    assert table.columns == ("", "baseline", "policy", "best of 4")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["score (reward model)"] == ("0.010 (-0.100 to 0.120)", "0.010 (-0.100 to 0.120)", "0.900")
    assert rows["judged score"] == ("0.200 (0.100 to 0.300)", "0.200 (0.100 to 0.300)", "0.450")
    assert rows["win rate"] == ("0.5", "0.655 (0.610 to 0.700)", "")
    assert rows["KL (nats)"] == ("0", "3.217 (3.100 to 3.300)", "at most 0.64")
    assert rows["judged gain per nat"] == ("", "0.000", f"{0.25 / 0.636:.3f}")
    assert rows["length (tokens)"] == ("16.5 (16.0 to 17.0)", "17.2 (16.0 to 18.0)", "")
    assert rows["distinct-2"] == ("", "0.500", "")  # what could not be computed stays empty


def test_the_report_holds_score_against_distance() -> None:
    data = comparison.report_data(evaluation(estimate(0.655, 0.61, 0.7)))
    assert ReportData.from_json(data.to_json()) == data
    judged, reward = data.plots
    best, policy = judged.lines
    assert list(zip(best.x, best.y, strict=True)) == [(0.0, 0.2), (0.193, 0.35), (0.636, 0.45)]
    assert (policy.x, policy.y, policy.low, policy.high) == ((3.217,), (0.2,), (0.1,), (0.3,))
    assert [(line.x, line.y) for line in reward.lines] == [((0.0, 0.193, 0.636), (0.01, 0.5, 0.9)), ((3.217,), (0.01,))]
    assert [fact.reference for fact in data.facts] == [0.5, 0.0]


def test_what_one_prompt_cannot_tell_is_left_out() -> None:
    """Its mean is shown alone, and drawn without whiskers."""
    alone = {"value": -1.082, "low": None, "high": None}
    record = evaluation(estimate(0.5, 0.055, 0.945)) | {"kl": alone}
    record |= {name: record[name] | {"score": alone} for name in ("baseline", "policy")}
    assert comparison.table(record).rows[0][1:3] == ("-1.082", "-1.082")
    plot = comparison.report_data(record).plots[1]
    policy = plot.lines[1]
    assert (policy.y, policy.low, policy.high) == ((-1.082,), (), ())
    assert "<svg" in figures.chart(plot.title, plot.x_label, plot.lines)

"""Alarms: each rule fires beyond its threshold and not before, says why, and what to do."""

from __future__ import annotations

import pytest

from rlhf.alarms import COMPARED_WITH_START, alarms, not_finite

HEALTHY = {
    "objective/kl": 2.0,
    "policy/approxkl_avg": 0.01,
    "policy/clipfrac_avg": 0.1,
    "policy/entropy_avg": 2.0,
    "gen/length_mean": 40.0,
    "gen/eos_rate": 0.8,
}


def test_a_healthy_step_raises_none() -> None:
    assert alarms(HEALTHY, HEALTHY) == []


@pytest.mark.parametrize(
    ("metric", "just_well", "too_much", "name", "advice"),
    [
        ("objective/kl", -0.5, -0.6, "negative KL", "--precision fp32"),
        ("policy/approxkl_avg", 0.1, 0.11, "large update", "lower learning_rate"),
        ("policy/clipfrac_avg", 0.3, 0.31, "much clipped", "lower learning_rate"),
        ("policy/entropy_avg", 0.5, 0.49, "low entropy", "raise kl_coef"),
        ("gen/length_mean", 60.0, 60.5, "length", "longer-wins baseline"),
        ("gen/eos_rate", 0.4, 0.39, "few endings", "raise missing_eos_penalty"),
    ],
)
def test_each_rule_has_its_threshold(metric: str, just_well: float, too_much: float, name: str, advice: str) -> None:
    assert alarms(HEALTHY | {metric: just_well}, HEALTHY) == []
    (alarm,) = alarms(HEALTHY | {metric: too_much}, HEALTHY)
    assert alarm.name == name
    assert advice in alarm.advice
    assert alarm.title


def test_a_policy_that_hardly_ever_ended_is_not_blamed_for_it() -> None:
    start = HEALTHY | {"gen/eos_rate": 0.2}
    assert alarms(HEALTHY | {"gen/eos_rate": 0.0}, start) == []


def test_without_an_update_the_update_is_not_judged() -> None:
    rollout_only = {name: value for name, value in HEALTHY.items() if not name.startswith("policy/a")}
    assert alarms({k: v for k, v in rollout_only.items() if "clipfrac" not in k}, HEALTHY) == []


def test_a_run_remembers_what_the_rules_compare_with() -> None:
    start = {name: HEALTHY.get(name, 0.0) for name in COMPARED_WITH_START}
    assert alarms(HEALTHY, start) == []


def test_numbers_that_are_not_finite_are_named() -> None:
    numbers = {"a": 1.0, "b": float("nan"), "c": float("inf"), "d": -float("inf"), "e": 0.0}
    assert not_finite(numbers) == ["b", "c", "d"]

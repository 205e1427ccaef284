"""The weight of the KL penalty: the listed values (science.md 1c), and the direction."""

from __future__ import annotations

import pytest

from rlhf.kl_control import AdaptiveKL, FixedKL


@pytest.mark.parametrize(
    ("kl", "expected"), [(12, 0.151536), (6.3, 0.150384), (6, 0.15), (3, 0.148464), (0, 0.148464), (-1, 0.148464)]
)
def test_the_adaptive_weight_has_the_listed_values(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.15, target=6, horizon=10_000)
    controller.update(kl, 512)
    assert controller.value == pytest.approx(expected, abs=1e-9)


def test_the_weight_rises_above_the_target_and_falls_below_it_by_steps_that_multiply() -> None:
    controller = AdaptiveKL(0.1, target=2.0, horizon=1000)
    for _ in range(3):
        controller.update(4.0, 100)
    assert controller.value == pytest.approx(0.1 * 1.02**3)
    for _ in range(3):
        controller.update(1.0, 100)
    assert controller.value == pytest.approx(0.1 * 1.02**3 * 0.98**3)


def test_a_fixed_weight_stays() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, 512)
    assert controller.value == 0.05

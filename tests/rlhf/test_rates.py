"""Rates from pieces whose true cost is known."""

from __future__ import annotations

import random

import pytest

from rlhf.flops import Fed
from rlhf.probe import cached
from rlhf.rates import Rates
from rlhf.workload import Row, forwarding


def test_linear_costs_are_found_exactly() -> None:
    def true(calls: float, tokens: float, pairs: float) -> float:
        return 0.25 * calls + 3e-5 * tokens + 2e-9 * pairs

    shapes = [(1, 100, 1e4), (1, 400, 4e4), (2, 900, 3e5)]
    rates = Rates.fit([(dict(zip(("calls", "tokens", "pairs"), s, strict=True)), true(*s)) for s in shapes])
    assert rates.cost({"calls": 7, "tokens": 1e6, "pairs": 1e9}) == pytest.approx(true(7, 1e6, 1e9), rel=1e-9)


def test_no_rate_is_negative_and_what_was_never_seen_is_free() -> None:
    rates = Rates.fit([({"calls": 1, "tokens": 100}, 5.0), ({"calls": 1, "tokens": 200}, 4.0)])
    assert rates.per["tokens"] == 0
    assert 4 < rates.per["calls"] < 5
    assert rates.cost({"calls": 1, "steps": 9}) == rates.per["calls"]


def test_one_piece_says_a_rate() -> None:
    assert Rates.fit([({"tokens": 50}, 2.0)]).cost({"tokens": 100}) == pytest.approx(4.0)


def test_noise_of_a_tenth_moves_what_is_foretold_by_less() -> None:
    random.seed(0)
    pieces = [({"calls": 1, "tokens": n}, (0.1 + n / 1000) * random.uniform(0.9, 1.1)) for n in (50, 200, 800, 800)]
    assert Rates.fit(pieces).cost({"calls": 10, "tokens": 16_000}) == pytest.approx(17, rel=0.1)


def test_a_single_piece_of_work_is_explained_by_its_tokens() -> None:
    """A fixed cost alone would make larger batches free."""
    for work, larger in (
        (forwarding([Fed(100, 1)]), forwarding([Fed(400, 1)])),
        (cached([Row(50, 50)]), cached([Row(200, 200)])),
    ):
        assert Rates.fit([(work, 2.0)]).cost(larger) == pytest.approx(8.0)

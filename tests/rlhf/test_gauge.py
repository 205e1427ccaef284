"""The process's memory goes up and down with what is allocated."""

from __future__ import annotations

import torch

from rlhf.gauge import Gauge

LARGE = 200 * 2**20


def test_the_peak_holds_what_was_freed_and_what_is_live_does_not() -> None:
    gauge = Gauge(torch.device("cpu"))
    before = gauge.live()
    torch.ones(LARGE // 4)
    assert 0.99 * LARGE < gauge.peak() - before < 1.1 * LARGE, "the kernel counts to within some pages a thread"
    assert abs(gauge.live() - before) < 0.1 * LARGE
    assert gauge.peak() - before < 0.1 * LARGE, "the peak began anew"


def test_there_is_more_to_be_had_than_is_in_use() -> None:
    gauge = Gauge(torch.device("cpu"))
    assert gauge.available() > gauge.live()

"""What the benchmarks compute from measurements, on made-up ones; when the peer's environment is made anew."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.benchmarks.equal_samples import differences, pooled
from experiments.benchmarks.ppo import peer_environment
from experiments.benchmarks.ppo.sizes import expected
from experiments.benchmarks.rollout import Load, limit, medians, repeated, until_eos
from experiments.benchmarks.scaling import markdown, slope


def test_differences_are_by_prompt_and_in_deviations_of_the_start() -> None:
    ours = np.array([[3.0, 5.0], [1.0, 1.0]])
    peer = np.array([[1.0, 1.0], [2.0, 4.0]])
    sft = np.array([[0.0, 4.0], [0.0, 4.0]])  # deviation 2
    assert differences(ours, peer, sft).tolist() == [1.5, -1.0]


def test_runs_stay_as_they_are_and_weigh_the_same() -> None:
    # resampled together, the prompts would vary, and the longer run would weigh more
    found = pooled([np.zeros(2), np.ones(6)])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_pooled_interval_is_that_of_resampled_prompts() -> None:
    # each mean is normal with deviation 1 / sqrt(400), and the mean of two such has 1 / sqrt(800): 1.96 of it is 0.069
    rng = np.random.default_rng(0)
    runs = [(values - values.mean()) / values.std() for values in (rng.normal(size=400), rng.normal(size=400))]
    found = pooled([runs[0] + 1, runs[1] - 1])
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.low == pytest.approx(-0.0693, abs=0.006)
    assert found.high == pytest.approx(0.0693, abs=0.006)


@pytest.mark.parametrize("power", [0.8, 1.0, 2.0])
def test_the_slope_is_the_power_of_the_law(power: float) -> None:
    sizes = [8, 16, 32, 64]
    assert slope(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, rel=1e-12)


def test_the_next_size_takes_at_least_twice_as_long() -> None:
    assert expected([]) == 0
    assert expected([10.0]) == 20
    assert expected([10.0, 15.0]) == 30
    assert expected([10.0, 30.0]) == 90


def test_a_table_says_which_sizes_were_left_out() -> None:
    row = {"sampling": 1.0, "measuring": 0.5, "updating": 2.5, "step": 4.0, "tokens": 2000, "peak_mb": 900.0}
    rows = [{"size": 8, **row}, {"size": 16, **row, "step": 4.0, "tokens": 4000}]
    table = {"grows": "batch", "trained": "all weights", "rows": rows, "left_out": [32, 64], "slopes": {}}
    written = markdown(table)
    assert "| 8 | 1.00 | 0.50 | 2.50 | 4.00 | 2000 | 2.00 | 2.00 | 900 |" in written
    assert "| 16 | 1.00 | 0.50 | 2.50 | 4.00 | 4000 | 1.00 | 1.00 | 900 |" in written
    assert written.endswith("Left out for the time limit: 32, 64")


def test_the_peers_environment_is_made_anew_beside_other_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(peer_environment, "_make", lambda folder: made.append(sys.prefix))
    marker = tmp_path / "installed"
    for prefix in ("/one", "/one", "/other"):
        monkeypatch.setattr(sys, "prefix", prefix)
        assert peer_environment.peer_python(tmp_path) == tmp_path / "bin" / "python"
        assert marker.read_text().strip() == prefix
    assert made == ["/one", "/other"]
    marker.write_text("")  # of a version that did not say
    peer_environment.peer_python(tmp_path)
    assert made == ["/one", "/other", "/other"]


# ---------------------------------------------------------------- sampling


def test_only_tokens_up_to_the_end_of_a_completion_count() -> None:
    assert [until_eos(row, (2, 9)) for row in ([5, 2, 0, 0], [9], [5, 6, 7], [])] == [2, 1, 3, 0]


def test_sampling_is_compared_within_a_turn() -> None:
    def run(tokens: int, seconds: float, least: float) -> dict[str, float]:
        return {"tokens": tokens, "seconds": seconds, "limit_seconds": least}

    runs = {
        "rlhf": [run(100, 1, 0.5), run(100, 2, 0.5), run(100, 4, 0.5)],  # the machine slows down
        "generate": [run(100, 4, 0.5), run(100, 6, 0.5), run(100, 20, 0.5)],
    }
    found = medians(runs)
    assert found["rlhf"] == {"tokens_per_second": 50, "ours_times_as_fast": 1, "share_of_limit": 0.25}
    assert found["generate"]["ours_times_as_fast"] == 4  # of 4, 3 and 5; the ratio of the medians is 3


def test_the_limit_of_the_machine_by_hand() -> None:
    """10 weights in the body, 6 in the head, which is the embedding's: 16 in all. 5 prompt tokens, 3 + 1 sampled."""
    table = SimpleNamespace(weight=SimpleNamespace(numel=lambda: 6))
    model = SimpleNamespace(
        get_output_embeddings=lambda: table,
        get_input_embeddings=lambda: table,
        parameters=lambda: [table.weight, SimpleNamespace(numel=lambda: 10)],
        config=SimpleNamespace(tie_word_embeddings=True),
    )
    load = Load([[1, 2], [1, 2, 3]], batch=2, tokens=9, eos=(), pad=0)
    operations, bytes_read = 2 * 10 * (5 + 4) + 2 * 6 * 4, 2 * 16 * 3  # three steps: the longer completion
    slow_products = {"gflops": 1e-9, "gbytes": 1.0}
    assert limit(model, load, [3, 1], slow_products) == pytest.approx(operations)
    assert limit(model, load, [3, 1], {"gflops": 1.0, "gbytes": 1e-9}) == pytest.approx(bytes_read)


def test_prompts_go_round_and_stand_together() -> None:
    assert repeated([[1], [2]], 6, 2) == [[1], [1], [2], [2], [1], [1]]

"""The exact solver against numbers computed elsewhere (numpy, no torch), and then PPO against the solver."""

from __future__ import annotations

import json
import math
from unittest.mock import patch

import pytest
import torch

from experiments.exact_optimum import __main__ as command
from experiments.exact_optimum import acceptance, exact, faults, tabular
from experiments.exact_optimum.exact import EOS, World
from experiments.exact_optimum.experiment import Result, Settings, run
from rlhf import ops

BETA = 0.5


@pytest.fixture(scope="module")
def world_a() -> World:
    return tabular.world()[0]


# ---------------------------------------------------------------- the solver


def test_world_a_has_156_prefixes_and_781_completions() -> None:
    found = exact.completions(6, 4)
    assert (len(exact.prefixes(6, 4)), len(found), len(set(found))) == (156, 781, 781)
    assert sum(ids[-1] == EOS for ids in found) == 156


def test_rows_follow_the_breadth_first_order() -> None:
    first = (0, 1, 6, 31)
    rows = {(): 0}
    for prefix in exact.prefixes(6, 4):
        for token in range(1, 6):
            if (depth := len(prefix)) < 3:
                rows[*prefix, token] = first[depth + 1] + (rows[prefix] - first[depth]) * 5 + token - 1
    sequences = exact.all_sequences(6, 4, prompt=[0], pad=EOS)
    found = tabular.rows_before(sequences.completion_ids)
    for ids, of_ids in zip(exact.completions(6, 4), found.tolist(), strict=True):
        assert of_ids[: len(ids)] == [rows[ids[:t]] for t in range(len(ids))]
    assert sorted(rows.values()) == list(range(156))


def test_reference_of_world_a(world_a: World) -> None:
    at = exact.outcome(world_a, world_a.reference, BETA)
    assert (at.score, at.objective) == pytest.approx((-0.1776, -0.1776), abs=5e-5)
    assert (at.kl, at.length, at.finished) == pytest.approx((0, 2.957, 0.594), abs=5e-4)


@pytest.mark.parametrize(
    ("beta", "objective", "score", "kl", "digits"),
    [
        (0.5, 0.5876, 1.3151, 1.4550, 4),
        (0.05, 2.583, 2.999, 8.327, 3),
        (0.1, 2.177, 2.954, 7.764, 3),
        (0.2, 1.494, 2.651, 5.786, 3),
        (1.0, 0.2025, 0.602, 0.399, 3),
        (2.0, 0.0051, 0.198, 0.096, 3),
    ],
)
def test_optimum_of_world_a(
    world_a: World, beta: float, objective: float, score: float, kl: float, digits: int
) -> None:
    at = exact.outcome(world_a, world_a.optimum(beta), beta)
    assert (at.objective, at.score, at.kl) == pytest.approx((objective, score, kl), abs=0.5000001 * 10**-digits)
    assert at.objective == pytest.approx(world_a.value_of_optimum(beta), abs=1e-12)
    if beta == BETA:
        assert (at.length, at.finished) == pytest.approx((2.832, 0.983), abs=5e-4)


def test_bandit_with_three_arms() -> None:
    sequences = exact.all_sequences(3, 1, prompt=[0], pad=EOS)
    reference = torch.tensor([[0.5], [0.3], [0.2]], dtype=torch.float64).log()
    bandit = World(sequences, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), reference)
    best = bandit.optimum(BETA)
    assert best.exp().tolist() == pytest.approx([0.036667, 0.162559, 0.800774], abs=1e-6)
    at = exact.outcome(bandit, best, BETA)
    assert (at.score, at.kl, at.objective) == pytest.approx((1.764107, 0.915475, 1.306369), abs=1e-6)
    assert exact.outcome(bandit, bandit.reference, BETA).objective == pytest.approx(0.7, abs=1e-12)


def test_optimum_equals_soft_value_iteration(world_a: World) -> None:
    """V(prefix) = beta log sum_a ref(a | prefix) exp(V(prefix + a) / beta): the same optimum, token by token."""
    reference = torch.from_numpy(tabular.world()[1].numpy()).log_softmax(-1)
    rows = {prefix: i for i, prefix in enumerate(exact.prefixes(6, 4))}
    value = dict(zip(exact.completions(6, 4), world_a.scores, strict=True))
    for prefix in reversed(list(rows)):
        value[prefix] = BETA * torch.stack(
            [reference[rows[prefix], a] + value[*prefix, a] / BETA for a in range(6)]
        ).logsumexp(0)
    assert float(value[()]) == pytest.approx(world_a.value_of_optimum(BETA), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "score", "kl"),
    [
        (2, 0.2712, 0.1588),
        (4, 0.7180, 0.6057),
        (8, 1.0928, 1.1849),
        (16, 1.3897, 1.8139),
        (64, 1.7920, 3.0916),
        (256, 2.1983, 4.4097),
    ],
)
def test_best_of_n_in_world_a(world_a: World, n: int, score: float, kl: float) -> None:
    found = exact.best_of_n(world_a, n)
    assert found == pytest.approx((score, kl), abs=5.0001e-5)
    assert found[1] < exact.best_of_n_bound(n)


def test_best_of_n_without_ties_reaches_the_bound_in_the_limit() -> None:
    """Many equally likely completions of distinct scores are nearly a continuous score."""
    sequences = exact.all_sequences(2000, 1, prompt=[0], pad=EOS)
    flat = World(sequences, torch.arange(2000.0, dtype=torch.float64), torch.full((2000, 1), -math.log(2000)).double())
    assert exact.best_of_n(flat, 4)[1] == pytest.approx(exact.best_of_n_bound(4), abs=2e-3)
    assert exact.best_of_n_bound(2) == pytest.approx(0.1931, abs=5e-5)


def test_best_of_one_is_the_reference(world_a: World) -> None:
    assert exact.best_of_n(world_a, 1) == pytest.approx(
        (exact.outcome(world_a, world_a.reference, 1).score, 0), abs=1e-9
    )


def test_best_policy_of_a_shared(world_a: World) -> None:
    assert tabular.best_shared(world_a, tabular.world()[1], beta=BETA) == pytest.approx(0.0857, abs=5e-5)


def test_identity_holds_for_any_policy_and_tells_a_wrong_kl(world_a: World) -> None:
    """k3 has the right mean and would pass too: what is wrong with it in a reward is its gradient."""
    logits = torch.randn(156, 6, generator=torch.Generator().manual_seed(1))
    logprobs = exact.logprobs_of(tabular.Table(logits), world_a.sequences)
    assert exact.identity_error(world_a, logprobs, BETA) < 1e-12
    for wrong in (faults.k2, lambda logprobs, ref_logprobs: ref_logprobs - logprobs):
        with patch.object(ops, "kl_k1", wrong):
            assert exact.identity_error(world_a, logprobs, BETA) > 1e-3


def test_engine_draws_from_the_table(world_a: World) -> None:
    engine = tabular.TableEngine(tabular.Table(tabular.world()[1].float()))
    drawn = engine.generate([[0]] * 50_000, max_tokens=4, temperature=1.0, generator=torch.Generator().manual_seed(0))
    place = {ids: i for i, ids in enumerate(exact.completions(6, 4))}
    counts = torch.bincount(torch.tensor([place[tuple(one.ids)] for one in drawn]), minlength=781)
    expected = world_a.reference.exp() * 50_000
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 781 + 5 * (2 * 781) ** 0.5
    for one in drawn[:100]:
        assert sum(one.logprobs) == pytest.approx(float(world_a.reference[place[tuple(one.ids)]]), abs=1e-5)
        assert one.finished == (one.ids[-1] == EOS)


# ---------------------------------------------------------------- PPO


def passes(kind: str, result: Result) -> None:
    assert acceptance.failures(kind, result) == []


def test_ppo_finds_the_optimum_of_world_a() -> None:
    passes("A", run(Settings("A")))


def test_tokens_weigh_the_same_in_a_shared() -> None:
    """A mean per sequence closes 90 % here, at a length of 2.42 instead of 2.19."""
    result = run(Settings("A-shared", updates=100))
    passes("A-shared", result)
    assert result.trained.length == pytest.approx(2.19, abs=0.08)


def test_transformer_through_the_whole_trainer() -> None:
    result = run(Settings("B", updates=40))
    assert result.closed > 0.85
    assert result.identity_error < 1e-6


@pytest.mark.parametrize("fault", ["k3_in_reward", "kl_sign", "score_on_padding"])
def test_planted_faults_show_in_the_gap(fault: str) -> None:
    assert run(Settings("A", updates=30, fault=fault)).closed < 0.5


def test_json_has_what_a_script_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--env", "A", "--seed", "3", "--beta", "0.7", "--reward-seed", "5", "--updates", "2", "--json"]
    monkeypatch.setattr("sys.argv", ["exact_optimum", *arguments])
    command.main()
    found = json.loads(capsys.readouterr().out)
    assert {"closed", "kl", "score", "length", "identity_error"} <= found.keys()
    assert found["seed"] == 3
    assert found["beta"] == 0.7
    optimum = found["optimum"]
    assert optimum["objective"] == pytest.approx(optimum["score"] - 0.7 * optimum["kl"], abs=1e-12)
    assert found["reference"]["objective"] < found["best"]


def test_table_names_what_was_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["exact_optimum", "--updates", "1"])
    command.main()
    out = capsys.readouterr().out
    assert "gap closed" in out
    assert "reference" in out

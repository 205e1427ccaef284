"""One uniform number draws one token, exactly, from any vocabulary."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation.sampling import sample
from tests.rlhf import ppo_world as world


def test_a_token_is_drawn_by_inverting_the_distribution_function() -> None:
    """The share of the unit interval that leads to each token is its probability, to the width of the grid."""
    logits = torch.tensor([1.5, -2.0, 0.0, float("-inf"), 0.3])
    for temperature in (0.3, 1.0, 2.0):
        grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        tokens, logprobs = sample(logits.expand(20_000, 5), grid, temperature=temperature)
        probabilities = (logits.double() / temperature).softmax(-1)
        shares = torch.bincount(tokens, minlength=5) / 20_000
        torch.testing.assert_close(shares.double(), probabilities, rtol=0, atol=1e-4)
        torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], rtol=0, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform: float) -> None:
    for seed in range(50):
        logits = torch.randn(1, 500, generator=world.seeded(seed))
        logits[0, [0, -1]] = float("-inf")
        token, logprob = sample(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0)
        assert int(token) == (1 if uniform == 0 else 498)
        assert torch.isfinite(logprob).all()


def test_rare_tokens_are_not_lost_in_a_large_vocabulary() -> None:
    """In fp32 a running sum over 50,000 entries is off by more than the probability of most of them."""
    logits = torch.zeros(1, 50_000)
    for token in (17, 24_999, 49_990):
        tokens, _ = sample(logits, torch.tensor([(token + 0.5) / 50_000], dtype=torch.float64), temperature=1.0)
        assert int(tokens) == token


def test_many_rows_are_drawn_as_each_alone() -> None:
    """Rows are drawn in groups that fit into the processor's cache."""
    logits, uniforms = (
        torch.randn(21, 300, generator=world.seeded(3)),
        torch.rand(21, generator=world.seeded(4)).double(),
    )
    tokens, logprobs = sample(logits, uniforms, temperature=0.7)
    for row in range(21):
        token, logprob = sample(logits[row : row + 1], uniforms[row : row + 1], temperature=0.7)
        assert token == tokens[row]
        assert logprob == logprobs[row]

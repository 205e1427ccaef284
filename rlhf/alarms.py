"""What a person watching the curves would call out: pure rules over one step's metrics.

Thresholds follow the reference runs of the field (see each rule); they warn and never stop a run by themselves, except
where nothing sensible can follow (numbers that are not finite).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

COMPARED_WITH_START = ("objective/scores", "policy/entropy_avg", "gen/length_mean", "gen/eos_rate")
"""Metrics whose first value a run remembers: for the alarms, and for its report."""


class Alarm(NamedTuple):
    """A finding and what to do about it; `name` says which rule found it."""

    name: str
    title: str
    advice: str


def alarms(now: Mapping[str, float], start: Mapping[str, float]) -> list[Alarm]:
    """What is wrong with the metrics of this step, compared with those of the run's first rollout."""
    rules = (
        (
            "negative KL",
            now["objective/kl"] < -0.5,
            f"KL to the reference is {now['objective/kl']:.2f}, but it cannot be negative",
            "sampling and logprobs disagree: run with --precision fp32, and report it if that does not help",
        ),
        (
            "large update",
            now.get("policy/approxkl_avg", 0) > 0.1,
            f"the policy moved by approxkl {now.get('policy/approxkl_avg', 0):.3f} in one update (0.1 is much)",
            "lower learning_rate or num_ppo_epochs",
        ),
        (
            "much clipped",
            now.get("policy/clipfrac_avg", 0) > 0.3,
            f"{now.get('policy/clipfrac_avg', 0):.0%} of the tokens were clipped in one update (30% is much)",
            "lower learning_rate or num_ppo_epochs",
        ),
        (
            "low entropy",
            now["policy/entropy_avg"] < 0.25 * start["policy/entropy_avg"],
            f"entropy fell to {now['policy/entropy_avg']:.2f} from {start['policy/entropy_avg']:.2f} nats per token",
            "the policy repeats itself: raise kl_coef",
        ),
        (
            "length",
            now["gen/length_mean"] > 1.5 * start["gen/length_mean"],
            f"completions grew to {now['gen/length_mean']:.0f} from {start['gen/length_mean']:.0f} tokens",
            "the reward may pay for length: compare the reward model with its longer-wins baseline",
        ),
        (
            "few endings",
            start["gen/eos_rate"] > 0.2 and now["gen/eos_rate"] < 0.5 * start["gen/eos_rate"],
            f"{now['gen/eos_rate']:.0%} of the completions end by themselves, {start['gen/eos_rate']:.0%} did at first",
            "raise missing_eos_penalty or max_completion_tokens",
        ),
    )
    return [Alarm(name, title, advice) for name, holds, title, advice in rules if holds]


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Names of the metrics that are NaN or infinite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]

"""The weight of the KL penalty: fixed, or steered towards a target. Pure numbers."""

from __future__ import annotations

from typing import Protocol


class KLController(Protocol):
    """Sets the weight of the KL penalty for the next rollout."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Learn the mean KL per sequence (nats) of the last `episodes` completions."""
        ...


class FixedKL:
    """The weight stays."""

    def __init__(self, value: float):
        self.value = value

    def update(self, kl: float, episodes: int) -> None:
        """Nothing to learn."""


class AdaptiveKL:
    """Proportional control towards `target` nats per sequence, eq. 3 of Ziegler et al. 2019."""

    def __init__(self, value: float, *, target: float, horizon: int):
        self.value = value
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """value *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon"""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * episodes / self.horizon

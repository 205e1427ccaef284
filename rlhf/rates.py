"""What costs how much: non-negative rates from a few timed pieces of work, by which more work is foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

Work = Mapping[str, float]
"""How much there is to do of each kind: `{"calls": 1, "tokens": 4096}`."""


@dataclass(frozen=True)
class Rates:
    """Cost of one unit of each kind of work, in the unit that the costs were given in."""

    per: Mapping[str, float]

    @staticmethod
    def fit(pieces: Sequence[tuple[Work, float]]) -> Rates:
        """Rates of 0 or more that explain these pieces of work with their costs.

        A cost counts by the root of its size, as if its error grew likewise: what is foretold is rather like the
        largest. Exact where the costs are linear and there are as many different pieces as kinds of work.
        """
        kinds = list(dict.fromkeys(kind for work, _ in pieces for kind in work))
        amounts = np.array([[work.get(kind, 0.0) for kind in kinds] for work, _ in pieces])
        costs = np.array([cost for _, cost in pieces])
        weights = 1 / np.sqrt(np.maximum(costs, 1e-9))
        scale = np.maximum(amounts.max(0), 1e-9)  # or kinds that come in millions would hide the others
        found, _ = nnls(amounts / scale * weights[:, None], costs * weights)
        return Rates(dict(zip(kinds, (found / scale).tolist(), strict=True)))

    def cost(self, work: Work) -> float:
        """Of this much work; kinds that were never seen cost nothing."""
        return sum(self.per.get(kind, 0.0) * amount for kind, amount in work.items())

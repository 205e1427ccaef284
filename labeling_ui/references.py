"""What others have measured: lines to read one's own agreement beside. Whoever shows one, shows its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["pairwise", "reward_model", "gwet_ac2", "weighted_kappa"]


@dataclass(frozen=True)
class Reference:
    """A published number; `spread` is the +- that its authors give. `second_hand`: not read in the source itself."""

    name: str
    measure: Measure
    value: float
    source: str
    spread: float | None = None
    second_hand: bool = False


INSTRUCT_GPT = "Ouyang et al. 2022 (InstructGPT)"
SUMMARIES = "Stiennon et al. 2020"
REFERENCES = (
    Reference("labelers with each other", "pairwise", 0.726, f"{INSTRUCT_GPT}, 3.4", 0.015),
    Reference("labelers who did not make the training data", "pairwise", 0.773, f"{INSTRUCT_GPT}, 3.4", 0.013),
    Reference("labelers with researchers", "pairwise", 0.77, f"{SUMMARIES}, 3.3", 0.02),
    Reference("researchers with each other", "pairwise", 0.73, f"{SUMMARIES}, 3.3", 0.04),
    Reference("labelers with each other, training data", "pairwise", 0.72, f"{SUMMARIES}, C.2", second_hand=True),
    Reference("researchers with crowd workers, unfiltered", "pairwise", 0.63, "Bai et al. 2022 (HH-RLHF), 2.1"),
    Reference("experts with each other, no ties", "pairwise", 0.81, "Zheng et al. 2023 (MT-Bench)", second_hand=True),
    Reference("reward model on its own labelers", "reward_model", 0.724, f"{INSTRUCT_GPT}, 4.1", 0.004),
    Reference("reward model on other labelers", "reward_model", 0.696, f"{INSTRUCT_GPT}, 4.1", 0.009),
    Reference("helpfulness, 7 points, lowest", "gwet_ac2", 0.37, "Touvron et al. 2023 (Llama 2), 3.4.3"),
    Reference("helpfulness, 7 points, highest", "gwet_ac2", 0.55, "Touvron et al. 2023 (Llama 2), 3.4.3"),
    Reference("safety, mean", "gwet_ac2", 0.92, "Touvron et al. 2023 (Llama 2), 3.4.3"),
    Reference("helpfulness, filtered", "weighted_kappa", 0.706, "Wang et al. 2024 (HelpSteer2)", second_hand=True),
)


def references(measure: Measure) -> list[Reference]:
    """The published numbers of one measure, highest first."""
    return sorted((each for each in REFERENCES if each.measure == measure), key=lambda each: -each.value)

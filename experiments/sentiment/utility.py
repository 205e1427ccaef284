"""What the simulated annotators like: positive sentiment, by a lexicon that people rated (VADER).

It stands in for people in two places only: as the annotators' taste, and as the judge that evaluates the result.
Nothing that trains may call it; the reward is the model trained on the rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rlhf.types import Prompt, prompt_text


def vader(prompt: Prompt, completion: str) -> float:
    """Sentiment of the whole review, from -1 to 1.

    Prompt and completion are read as one text, as an annotator reads them: the prompt "The film is not" turns the
    completion " good." around, which the completion alone does not show.
    """
    return _analyzer().polarity_scores(prompt_text(prompt) + completion)["compound"]


def judge(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """`vader` for many: decides the wins in the evaluation, as a truth that no training has seen."""
    return [vader(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()

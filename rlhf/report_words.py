"""The words of the field, explained for the reader of a report who is not of it."""

from __future__ import annotations

WORDS = {
    "policy": "the model that PPO trained.",
    "baseline": "what PPO started from: a model fine-tuned on demonstrations (SFT) where there were any.",
    "SFT": "supervised fine-tuning: the model learns to continue prompts as the demonstrations do.",
    "PPO": (
        "proximal policy optimisation: the model writes, the reward model scores, and what scored well becomes "
        "likelier, in small steps."
    ),
    "reward model": "a model that learned from the rankings to say which completion people would prefer.",
    "score": (
        "what the reward model gives; 0 is the mean and 1 the standard deviation over completions of the SFT model."
    ),
    "judged": (
        "scored by the judge, who decides the wins and whom PPO never saw. Without a judge of its own, the reward"
        " model judges."
    ),
    "win rate": (
        "share of pairs, one completion of each model for the same prompt, in which the policy's is judged better."
    ),
    "held-out": "kept out of all training.",
    "95 % interval": (
        "if the whole measurement were repeated with other prompts, about 95 of 100 such intervals would hold the"
        " true value."
    ),
    "KL": (
        "how far the policy has moved from the baseline. 0: it writes the same; at 3 nats, what it writes is "
        "typically e³ = 20 times as likely as it was under the baseline."
    ),
    "nat": "the unit of KL, entropy and loss: a natural logarithm of probabilities.",
    "best of": (
        "the baseline writes n completions and the reward model picks one: what the same reward model gives "
        "without any training."
    ),
    "entropy": "how undecided the policy is while it writes; a collapse towards 0 means that it always says the same.",
    "value model": (
        "PPO's forecast of the score while a completion is being written; 1 explains all of what comes, 0 is no "
        "better than a constant."
    ),
    "distinct-2": "share of word pairs that occur only once: a model that repeats itself has a low one.",
    "ended by itself": "share of completions that came to an end before the length limit.",
    "agreement": "share of pairs on which two annotators who ranked the same item agree; 0.5 is chance.",
    "pair accuracy": "share of pairs in which the reward model scores the preferred completion higher; 0.5 is chance.",
    "Kendall tau": "how well two orders agree: 1 is the same order, 0 is chance, -1 is reversed.",
    "calibration error": "mean gap between how sure the reward model is and how often it is right.",
    "step": "one round of training: in PPO, one batch of completions written, scored and learned from.",
}
"""A page explains those that occur in it, in this order."""

"""A reward model in use: text in, calibrated scores out.

The model reads prompt + completion + EOS, and its score is the head's output at that EOS. It reads the same of a
completion that was cut off at the token limit: whether a completion ended by itself is not the reward model's to judge
(PPO has `missing_eos_penalty`). A completion longer than the limit of training is cut as it was in training; EOS stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import contract as contracts
from rlhf.config import Precision
from rlhf.contract import Contract, check_same_template
from rlhf.last_layer import last_layer_at
from rlhf.model_files import is_classifier, local_source
from rlhf.models import autocast, compute_dtype, device, hold_once, load_classifier, load_tokenizer, only_read
from rlhf.progress import OnProgress, ignore
from rlhf.sequences import length_mask, pad_rows
from rlhf.text import encode_completion, encode_prompt
from rlhf.trunk import StateFile, Trunk
from rlhf.types import ContractError, DataError, Prompt

GROUP = 16
"""Rows padded to one length: the completions of a ranking differ in theirs, and padding costs as much as text."""


class RewardModel:
    """Scores completions: a `rlhf.types.RewardFn` on a frozen sequence classifier with one output.

    `(raw - score_mean) / score_std`, with the two constants in the model's `config.json`, puts the completions that
    were ranked at mean 0 and standard deviation 1.
    """

    def __init__(
        self,
        classifier: Any,
        tokenizer: Any,
        *,
        contract: Contract | None = None,
        precision: Precision = "auto",
        batch_size: int = 32,
    ) -> None:
        """`contract` brings the token limit of training; `batch_size` is how many sequences are forwarded together."""
        self.classifier = classifier.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.contract = contract
        self.batch_size = batch_size
        self._dtype = compute_dtype(precision, _device_of(classifier))
        self.score_mean, self.score_std = calibration(classifier)
        self._trunk: Trunk | None = None

    @staticmethod
    def load(folder: str | Path, *, precision: Precision = "auto", batch_size: int = 32) -> RewardModel:
        """The reward model in a folder or hub repository. Raises ContractError for a model without a trained score."""
        source = local_source(str(folder))
        if not is_classifier(source):
            raise ContractError(f"{folder} is no reward model, it has no trained score: train one with `rlhf reward`")
        tokenizer = load_tokenizer(str(folder))
        classifier = load_classifier(str(folder), tokenizer).to(device())
        contract = contracts.load(source)
        model = RewardModel(classifier, tokenizer, contract=contract, precision=precision, batch_size=batch_size)
        only_read(unwrapped(classifier), model._dtype, but=unwrapped(classifier).score)
        return model

    def share_weights(self, other: Any) -> None:
        """Hold weights that a frozen model beside this one has, too, only once. Scores do not change."""
        hold_once(unwrapped(self.classifier), other)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One calibrated score per completion, in the order given."""
        return ((self.raw_scores(prompts, completions) - self.score_mean) / self.score_std).tolist()

    def raw_scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """(N,) the classifier's own logits, fp32, on the CPU. Raises DataError for lists of different lengths."""
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts for {len(completions)} completions: give one of each")
        return scores_of(
            self.classifier,
            self.rows(prompts, completions),
            pad=self.tokenizer.pad_token_id,
            dtype=self._dtype,
            batch_size=self.batch_size,
        )

    def rows(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        """What it reads: the ids of each prompt and its completion, and EOS."""
        limit = self.contract.max_completion_tokens if self.contract else None
        return [
            encode_prompt(self.tokenizer, prompt) + encode_completion(self.tokenizer, completion, max_tokens=limit)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def on_trunk(self, policy: Contract) -> bool:
        """Whether its lower layers are the policy's frozen trunk, by both contracts, and can be left out."""
        if self.contract is None or not self.contract.shares_trunk_with(policy):
            return False
        if self._trunk is None:
            self._trunk = Trunk.of(self.classifier, self._dtype, depth=policy.trunk_depth)
        return self._trunk is not None

    @torch.no_grad()
    def score_hidden(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B,) calibrated scores, fp32, from the trunk's states (B, L, D) of rows of `lengths` (B,) tokens.

        The rows are padded on the right and end with EOS. Equal to scoring their text. Ask `on_trunk` first.
        """
        assert self._trunk is not None, "on_trunk says whether these states mean anything to this model"
        raw = torch.empty(len(hidden))
        for rows in lengths.argsort(stable=True).split(GROUP):
            longest = int(lengths[rows].max())
            blank = [[0] * length for length in lengths[rows].tolist()]
            with self._trunk.handing_on(unwrapped(self.classifier), hidden[rows, :longest]):
                raw[rows] = sequence_scores(self.classifier, blank, pad=0, dtype=self._dtype).cpu()
        return (raw - self.score_mean) / self.score_std

    def check_policy(self, policy: Contract, *, name: str) -> None:
        """Refuse a policy whose conversations this model would read differently; raises ContractError."""
        if self.contract is not None:
            check_same_template(self.contract, policy, mine_name="the reward model", theirs_name=name)


def sequence_scores(
    classifier: Any, rows: Sequence[Sequence[int]], *, pad: int, dtype: torch.dtype, states: StateFile | None = None
) -> Tensor:
    """(B,) scores at each row's last token, fp32, with gradient where weights are trained.

    Equal to what the classifier itself returns, but the head is computed at that one position and in fp32 always: in
    bf16, scores near 4 would come in steps of 1/64, and completions that differ by less would be tied. Where `states`
    holds what the frozen lower layers make of these rows, those do not run.
    """
    whole = unwrapped(classifier)
    where = _device_of(whole)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with autocast(where, dtype):
        last = torch.cat(
            [_last_hidden(whole, [rows[i] for i in part], pad, states) for part in _chunks(by_length, GROUP)]
        )
    with torch.autocast(where.type, enabled=False):
        scores = whole.score(last.float()).squeeze(-1)
    return scores[torch.tensor(by_length, device=where).argsort()]


def _last_hidden(whole: Any, rows: Sequence[Sequence[int]], pad: int, states: StateFile | None) -> Tensor:
    """(B, D) the hidden state at each row's last token."""
    where = _device_of(whole)
    lengths = torch.tensor([len(row) for row in rows], device=where)
    ids = pad_rows(rows, pad=pad, side="right").to(where)
    mask = length_mask(lengths, ids.shape[1]).long()
    with states.handing_on(whole, rows) if states else nullcontext(), last_layer_at(whole, lengths - 1) as is_narrow:
        hidden = whole.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[:, 0] if is_narrow else hidden[torch.arange(len(rows), device=where), lengths - 1]


@torch.no_grad()
def scores_of(
    classifier: Any,
    rows: Sequence[Sequence[int]],
    *,
    pad: int,
    dtype: torch.dtype,
    batch_size: int,
    on_progress: OnProgress = ignore,
    states: StateFile | None = None,
) -> Tensor:
    """(N,) scores of any number of rows, in the order given, on the CPU; rows of like length are forwarded together.

    `on_progress` is told how many more are done.
    """
    scores = torch.empty(len(rows))
    for chunk in _chunks(sorted(range(len(rows)), key=lambda i: len(rows[i])), batch_size):
        part = [rows[i] for i in chunk]
        scores[chunk] = sequence_scores(classifier, part, pad=pad, dtype=dtype, states=states).cpu()
        on_progress(len(chunk))
    return scores


def calibration(classifier: Any) -> tuple[float, float]:
    """(score_mean, score_std) of a classifier; (0, 1) for one that was never calibrated."""
    config = unwrapped(classifier).config
    return float(getattr(config, "score_mean", 0.0)), float(getattr(config, "score_std", 1.0))


def set_calibration(classifier: Any, raw: Tensor) -> tuple[float, float]:
    """Write mean and standard deviation of raw scores into the classifier's config; returns them.

    Raises DataError where they cannot be: the scores are not finite, or all the same.
    """
    mean, std = raw.double().mean().item(), raw.double().std(correction=0).item()
    if not (raw.isfinite().all() and std > 0):
        raise DataError(
            f"the trained scores have mean {mean:.3g} and standard deviation {std:.3g}, of no use as a reward: "
            "lower learning_rate, or give rankings whose completions differ"
        )
    config = unwrapped(classifier).config
    config.score_mean, config.score_std = mean, std
    return mean, std


def unwrapped(classifier: Any) -> Any:
    """The classifier itself, adapters in place, without PEFT's wrapper around it."""
    return classifier.get_base_model() if hasattr(classifier, "peft_config") else classifier


def _device_of(classifier: Any) -> torch.device:
    return next(classifier.parameters()).device


def _chunks(items: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))

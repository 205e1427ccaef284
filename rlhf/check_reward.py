"""Invariants of a reward: any function, and more of a trained reward model.

Each function takes the subject and returns a finding; its docstring is the invariant.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf import models, text
from rlhf.check_report import Finding, failed, noted, passed, skipped, within
from rlhf.check_subject import RewardSubject, TrainedReward, largest
from rlhf.scoring import checked_scores
from rlhf.sequences import length_mask, pad_rows

HEAD = "score.weight"
ROUNDING = 1e-4
"""Of fp32 scores, for scores of unit size."""
RULE = "the reward is a function, not a model"


def scores(subject: RewardSubject) -> Finding:
    """One finite score per completion, the same each time, and not the same for all."""
    prompts, completions = subject.texts
    once, again = (checked_scores(subject.reward, prompts, completions) for _ in range(2))
    if once != again:
        return failed(
            "the same completions get other scores the second time",
            "take what is random out of the reward: dropout, sampling, state kept between calls",
            max(abs(a - b) for a, b in zip(once, again, strict=True)),
            0.0,
        )
    spread = max(once) - min(once)
    if spread < 1e-6 * max(1.0, max(map(abs, once))):
        return failed(
            f"{len(once)} different completions all get the score {once[0]:.4g}",
            "a constant reward teaches nothing: train the reward model longer, or look at what it reads",
            spread,
            "> 0",
        )
    return passed(spread, "> 0")


def head(subject: RewardSubject) -> Finding:
    """The head's weight lies in the model's file and is the one in use."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    if subject.source is None:
        return skipped("the reward model was given in memory")
    saved = _saved_head(subject.source.folder)
    if saved is None:
        return failed(
            f"{HEAD} is not in the model's file: transformers draws a new one at random each time it is loaded",
            "save the reward model again with its head (peft: task_type SEQ_CLS, or modules_to_save=['score'])",
        )
    gap = largest(_head_of(subject.reward.classifier).cpu() - saved.float())
    return within(
        gap, 0.0, cause="the head in use is not the one in the model's file", advice="load the reward model again"
    )


def position(subject: RewardSubject) -> Finding:
    """The score is the head's output at the EOS that ends the text, here and by transformers alone."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    classifier = models_inner(subject.reward.classifier)
    mine, at_eos = _raw(subject), _at_last_token(classifier, subject.rows)
    size = max(largest(at_eos), 1.0)
    gap = largest(mine - at_eos) / size
    if gap > ROUNDING:
        return failed(
            "the score is not the head's output at the EOS that ends the text",
            "the reward model must read prompt + completion + EOS and be scored at that EOS",
            gap,
            ROUNDING,
        )
    pad, ends = classifier.config.get_text_config().pad_token_id, subject.reward.tokenizer.eos_token_id
    theirs = _by_transformers(classifier, subject.rows, pad=subject.reward.tokenizer.pad_token_id, side="right")
    return within(
        largest(theirs - at_eos) / size,
        ROUNDING,
        cause="transformers alone gives other scores than this project"
        + (f": the config's pad token {pad} is EOS, so it scores the token before EOS" if pad == ends else ""),
        advice="call models.fix_padding on the reward model and save it again",
    )


def padding(subject: RewardSubject) -> Finding:
    """A score does not depend on padding (side and amount) or on what is scored beside it."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    prompts, completions = subject.texts
    together, pad = _raw(subject), subject.reward.tokenizer.pad_token_id
    alone = torch.cat([subject.reward.raw_scores([p], [c]) for p, c in zip(prompts, completions, strict=True)])
    classifier = models_inner(subject.reward.classifier)
    left, right = (
        _by_transformers(classifier, subject.rows, pad=pad, side=side, extra=5) for side in ("left", "right")
    )
    gap = max(largest(other - together) for other in (alone, left, right)) / max(largest(together), 1.0)
    return within(
        gap,
        ROUNDING,
        cause="a score changes with the padding, or with its neighbours in the batch",
        advice="the model must use attention_mask, and pad must be no token of the text (see `reward_pad`)",
    )


def pad(subject: RewardSubject) -> Finding:
    """The reward model's pad token is no EOS: transformers finds the end of a text by it."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    tokenizer = subject.reward.tokenizer
    ends = models.eos_token_ids(subject.reward.classifier, tokenizer)
    cause = "pads with its EOS: transformers would score the token before EOS"
    if tokenizer.pad_token_id in ends:
        return failed(f"the reward model {cause}", "load it with rlhf.models.load_tokenizer, or set another pad_token")
    raw = {subject.source.tokenizer.pad_token_id, subject.source.config.pad_token_id} if subject.source else set()
    if raw & set(ends):
        return noted(
            f"the reward model's source {cause}",
            f"mended when loading: padding is {tokenizer.pad_token!r} here. Was it trained elsewhere, with pad as EOS, "
            "its scores may mean something else",
        )
    return passed(f"pad {tokenizer.pad_token_id}", f"not in {list(ends)}")


def reload(subject: RewardSubject) -> Finding:
    """Saved and loaded by transformers alone, the reward model gives the same scores."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    from transformers import AutoModelForSequenceClassification

    reward = subject.reward
    with tempfile.TemporaryDirectory(prefix="rlhf-check-") as temporary:
        folder = Path(temporary) / "model"
        terms = text.contract_of(reward.tokenizer, eos_token_ids=(), max_prompt_tokens=1, max_completion_tokens=1)
        models.save_model(reward.classifier, reward.tokenizer, folder, contract=terms)
        plain = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=torch.float32)
    device = next(reward.classifier.parameters()).device
    again = _by_transformers(plain.to(device).eval(), subject.rows, pad=reward.tokenizer.pad_token_id, side="right")
    return within(
        largest(again - _raw(subject)) / max(largest(again), 1.0),
        ROUNDING,
        cause="the reward model gives other scores after saving and loading it",
        advice="save with models.save_model: it merges adapters and writes the head in fp32",
    )


def dropout(subject: RewardSubject) -> Finding:
    """The reward model is in evaluation mode."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    training = sum(module.training for module in subject.reward.classifier.modules())
    return within(
        training,
        0,
        cause=f"dropout is on: {training} modules of the reward model are in training mode",
        advice="call classifier.eval()",
    )


def calibration(subject: RewardSubject) -> Finding:
    """Scores are in units of their standard deviation, which gives kl_coef its meaning."""
    if not isinstance(subject.reward, TrainedReward):
        return skipped(RULE)
    config = models_inner(subject.reward.classifier).config
    mean, std = (getattr(config, name, None) for name in ("score_mean", "score_std"))
    if mean is None or std is None:
        return noted(
            "the reward model is not calibrated: its config has no score_mean and score_std",
            "raw scores are used. Train it with `rlhf reward`, or choose kl_coef for the size of its scores",
        )
    usable = math.isfinite(mean) and math.isfinite(std) and std > 0
    advice = "train the reward model again: its scores did not vary"
    return passed(std, "> 0") if usable else failed(f"score_mean is {mean} and score_std {std}", advice, std, "> 0")


# ---------------------------------------------------------------- parts


def models_inner(classifier: Any) -> Any:
    """The classifier without PEFT's wrapper, adapters in place."""
    return classifier.get_base_model() if hasattr(classifier, "peft_config") else classifier


def _raw(subject: RewardSubject) -> Tensor:
    assert isinstance(subject.reward, TrainedReward)
    return subject.reward.raw_scores(*subject.texts)


def _head_of(classifier: Any) -> Tensor:
    named = models_inner(classifier).score.named_parameters()
    return next(weight.detach().float() for name, weight in named if name.endswith("weight"))


def _saved_head(folder: Path) -> Tensor | None:
    """The head's weight as it lies in the folder's safetensors files."""
    from safetensors import safe_open

    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(folder), local_files_only=True))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name.endswith(HEAD):
                    return tensors.get_tensor(name)
    return None


@torch.no_grad()
def _at_last_token(classifier: Any, rows: list[list[int]]) -> Tensor:
    """The head at the last token of each row, one row at a time: no padding, no mask."""
    device = next(classifier.parameters()).device
    found = []
    for row in rows:
        hidden = classifier.base_model(input_ids=torch.tensor([row], device=device)).last_hidden_state
        found.append(classifier.score(hidden[:, -1]).reshape(1))
    return torch.cat(found).float().cpu()


@torch.no_grad()
def _by_transformers(classifier: Any, rows: list[list[int]], *, pad: int, side: Any, extra: int = 0) -> Tensor:
    """The classifier's own logits of a batch padded on one side, by `extra` more than it needs."""
    device = next(classifier.parameters()).device
    width = max(map(len, rows)) + extra
    fill = [[pad] * (width - len(row)) for row in rows]
    padded = [[*f, *row] if side == "left" else [*row, *f] for f, row in zip(fill, rows, strict=True)]
    mask = length_mask(torch.tensor([len(row) for row in rows]), width).long()
    mask = (mask.flip(1) if side == "left" else mask).to(device)
    ids = pad_rows(padded, pad=pad, side="right").to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = classifier(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, 0].float().cpu()

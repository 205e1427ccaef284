"""Why a check failed: the likely faults are tried, and the one that explains what was measured is named.

Nothing here runs while all is well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf import ops
from rlhf.check_subject import Subject, largest
from rlhf.sequences import Sequences

EXPLAINED = 1e-4
"""Logprobs that a fault brings this near to those measured are explained by it."""


# ---------------------------------------------------------------- sampling


def of_sampler(subject: Subject, gap: float) -> str:
    """Which other temperature or truncation comes much nearer to the sampler's logprobs than `gap`, if one does."""
    rows = [row * subject.model.temperature for row in rows_of_logits(subject, subject.sampled)]
    ways = {f"temperature {t / 20:g}": [row / (t / 20) for row in rows] for t in range(2, 41)}
    ways |= {f"top-k {k}": [_top_k(row / subject.temperature, k) for row in rows] for k in (5, 10, 20, 40, 50, 64, 100)}
    ways |= {f"top-p {p}": [_top_p(row / subject.temperature, p) for row in rows] for p in (0.8, 0.9, 0.95, 0.99)}
    drawn = subject.sampled
    gaps = {how: float(difference(_chosen(logits, drawn), drawn).abs().mean()) for how, logits in ways.items()}
    best = min(gaps, key=lambda how: gaps[how])
    return f": it sampled with {best}" if gaps[best] < gap / 3 else ""


@torch.no_grad()
def rows_of_logits(subject: Subject, drawn: list[Any]) -> list[Tensor]:
    """(T, V) logits of each completion at the training temperature, by the bare model on one row of ids."""
    rows = []
    for prompt, completion in zip(subject.prompt_ids, drawn, strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]], device=subject.device)
        logits = subject.policy(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.float() / subject.model.temperature)
    return rows


def difference(rows: list[Tensor], drawn: list[Any]) -> Tensor:
    """Logprobs of the tokens drawn, less what the sampler said."""
    return torch.cat([row.float().cpu() for row in rows]) - torch.tensor([x for d in drawn for x in d.logprobs])


def _chosen(rows: list[Tensor], drawn: list[Any]) -> list[Tensor]:
    """Logprobs of the tokens drawn; a token that could not have been is 100 nats off."""
    return [
        row.log_softmax(-1).gather(1, torch.tensor(d.ids, device=row.device)[:, None])[:, 0].clamp(min=-100)
        for row, d in zip(rows, drawn, strict=True)
    ]


def _top_k(logits: Tensor, k: int) -> Tensor:
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def _top_p(logits: Tensor, p: float) -> Tensor:
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.masked_fill((before >= p).gather(1, order.argsort()), float("-inf"))


# ---------------------------------------------------------------- padding


@torch.no_grad()
def of_padding(subject: Subject, batch: Sequences, logprobs: Tensor) -> str:
    """Which wrong mask or positions give just these logprobs of a padded batch, if one does."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    first = batch.prompt_ids.shape[1] - batch.prompt_lengths[:, None]
    last = batch.prompt_ids.shape[1] + batch.completion_lengths[:, None]
    mask, positions = ((place >= first) & (place < last)).long(), (place - first).clamp(min=0)
    faults = {
        "position_ids counted the padding on the left": (mask, place.expand_as(ids)),
        "attention_mask were left out": (torch.ones_like(mask), positions),
        "attention_mask and position_ids were left out": (torch.ones_like(mask), place.expand_as(ids)),
    }
    for fault, (seen, counted) in faults.items():
        out = subject.policy(input_ids=ids, attention_mask=seen, position_ids=counted, use_cache=False)
        logits = out.logits[:, -batch.completion_ids.shape[1] :].float()
        found = ops.token_logprobs(logits, batch.completion_ids, temperature=subject.model.temperature)
        if largest(ops.masked(found - logprobs, batch.completion_mask)) < EXPLAINED:
            return f", just as if {fault}"
    return ""


# ---------------------------------------------------------------- saving


def of_loading(saved: Any, loaded: Any) -> str:
    """Which weights came back different; nothing where the two have no names in common, as after a merge."""
    theirs = _named(loaded)
    changed = [
        name
        for name, weight in _named(saved).items()
        if name in theirs and (theirs[name].shape != weight.shape or largest(theirs[name].to(weight) - weight) > 0)
    ]
    return f": {changed[0]} is another ({len(changed)} such weights in all)" if changed else ""


def _named(model: Any) -> dict[str, Tensor]:
    """Names as they are without PEFT's wrapper."""
    return {name.removeprefix("base_model.model."): weight.detach() for name, weight in model.named_parameters()}

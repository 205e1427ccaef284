"""What a training is: its settings, data and first weights. Its checkpoints go on under no others."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.contract import digest
from rlhf.types import UserError

FREE = ("tracking", "output", "save_every")
"""Settings that may change on the way: no number depends on them."""

Origin = Mapping[str, Any]
"""`settings` by dotted name, and fingerprints of `data` and, where they matter, of the `weights` at the beginning."""


def origin_of(config: Any, data: Sequence[Any], model: nn.Module | None = None) -> dict[str, Any]:
    """What decides a training's result, as plain values that JSON keeps. `data` is what it trains on, as JSON knows it.

    Of `model` the trained weights count; of an adapter only its second factor, which begins at zero: the first is drawn
    anew each time, and means nothing by itself.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    origin = {"settings": dict(_flat(settings)), "data": digest(json.dumps(data))}
    return origin if model is None else origin | {"weights": _weights(model)}


def check_origin(kept: Origin | None, now: Origin, folder: Path) -> None:
    """Raise UserError where a checkpoint in `folder` is of another training; None, of an old one, is let through."""
    if kept is None:
        return
    before, after = kept["settings"], json.loads(json.dumps(now["settings"]))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        found = ", ".join(f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in changed[:5])
        raise UserError(f"{folder} holds checkpoints of a training with other settings ({found}): {_ADVICE}")
    if kept["data"] != now["data"]:
        raise UserError(f"{folder} holds checkpoints of a training on other data, or tokenised otherwise: {_ADVICE}")
    if kept.get("weights") != now.get("weights"):
        raise UserError(
            f"{folder} holds checkpoints of a training that began with other weights. It trains the model that it is "
            f"given: to go on, load that anew; or {_ADVICE}"
        )


_ADVICE = "choose another --output, or delete that folder to begin again"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _weights(model: nn.Module) -> str:
    checksum = 0
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad and "lora_A" not in name:
            data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(data.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"

"""The text contract: what a model assumes about text, written beside it and checked by everything that meets it.

A reward model trained on another tokenizer or chat template than the policy's scores different text than the policy
wrote, silently. `contract.json` makes that an error that shows both versions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from rlhf.types import ContractError

FILE_NAME = "contract.json"


@dataclass(frozen=True)
class Contract:
    """What a model was trained to read and write.

    `trunk_hash` names the weights of the embedding and the lowest `trunk_depth` layers, which stay frozen; models that
    share it (and `tokenizer_hash`) may share those layers' hidden states.
    """

    tokenizer_hash: str
    template_hash: str
    template: str | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    adds_bos: bool
    max_prompt_tokens: int
    max_completion_tokens: int
    trunk_hash: str | None = None
    trunk_depth: int = 0

    def save(self, folder: Path) -> None:
        """Write `contract.json` into `folder`."""
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def shares_text_with(self, other: Contract) -> bool:
        """Whether token ids mean the same to both models."""
        return self.tokenizer_hash == other.tokenizer_hash

    def shares_trunk_with(self, other: Contract) -> bool:
        """Whether hidden states of the frozen trunk mean the same to both models."""
        return self.trunk_hash is not None and self.trunk_hash == other.trunk_hash and self.shares_text_with(other)


def load(folder: Path) -> Contract | None:
    """The contract beside a model, or None where the folder has none (a model that this project did not train)."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Contract(**{**fields, "eos_token_ids": tuple(fields["eos_token_ids"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ContractError(f"{path} cannot be read ({error}): train the model again, or delete the file") from error


def check_same_template(
    mine: Contract,
    theirs: Contract,
    *,
    mine_name: str,
    theirs_name: str,
    advice: str = "train both from the same SFT checkpoint",
) -> None:
    """Refuse two models that render the same conversation differently; raises ContractError with both templates."""
    if mine.template_hash == theirs.template_hash or not mine.shares_text_with(theirs):
        return  # with another tokenizer the text itself is exchanged, and each model applies its own template
    here, there = _parting(mine.template, theirs.template)
    raise ContractError(
        f"{mine_name} and {theirs_name} share a tokenizer but not a chat template, so one would read other text than "
        f"the other wrote: {advice}.\n  {mine_name}: {here}\n  {theirs_name}: {there}"
    )


SHOWN = 60
"""Characters of a template that are shown before and after the place where two of them part."""


def _parting(mine: str | None, theirs: str | None) -> tuple[str, str]:
    """Two templates on one line each, about the place where they part."""
    pairs = zip_longest(mine or "", theirs or "")
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
    part = slice(max(same - SHOWN, 0), same + SHOWN)
    return repr(mine and mine[part]), repr(theirs and theirs[part])


def digest(text: str) -> str:
    """A short, stable fingerprint of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

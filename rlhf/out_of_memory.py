"""Where memory does not suffice for what is computed together: half of that at a time from then on, the same result.

PPO gives its micro-batches and the rows that decode together to a `Halving`, reward training its micro-batches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.progress import say
from rlhf.types import UserError

T = TypeVar("T")

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc", "STATUS_ALLOC_FAILED")
"""In the messages of CUDA and MPS, of torch on Linux and on Windows, of C++ and of cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. Torch has a class for that on a GPU only; elsewhere the message tells."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@dataclass
class Halving:
    """Into how many parts rows that would be computed together are cut; into twice as many where memory is short.

    The parts stay that small for the rest of the run. One process alone can do that: another would wait in vain for
    one that computes more parts.
    """

    setting: str
    """What is halved, by the name of the setting: `micro_batch_size`."""
    size: int
    """Its value in the configuration."""
    stage: str = "ppo"
    unit: str = "sequence"
    """What a single row is, to the user."""
    times: int = 0

    @staticmethod
    def of_micro_batches(size: int, tokens: int | None) -> Halving:
        """Of PPO's micro-batches, which `tokens` bound where they are given."""
        return Halving("micro_batch_size", size) if tokens is None else Halving("micro_batch_tokens", tokens)

    @property
    def now(self) -> int:
        """What the setting would have to be for parts of this size."""
        return -(-self.size // 2**self.times)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """These rows in parts that are computed one after another; in one, unless memory was short before."""
        return [part for part in rows.tensor_split(2**self.times) if len(part)]

    def in_parts(self, micro_batches: Sequence[Tensor], compute: Callable[[list[Tensor]], T]) -> T:
        """What `compute` makes of these micro-batches, or where memory does not suffice of parts of them."""

        def attempt() -> T:
            return compute([part for rows in micro_batches for part in self.parts(rows)])

        return self.retried(attempt, rows=max(map(len, micro_batches)))

    def retried(self, attempt: Callable[[], T], *, rows: int, undo: Callable[[], None] = lambda: None) -> T:
        """What `attempt` returns, of which at most `rows` rows are computed together.

        Where it runs out of memory, what it did is undone, and it is tried again in smaller parts. Raises UserError
        where a part is one row already, and in one of several processes.
        """
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._check_can_halve(rows, error)
            # not inside `except`: the traceback holds the attempt's frames, and they all that it had computed
            self._halve()
            _free()
            undo()

    def _check_can_halve(self, rows: int, error: Exception) -> None:
        count = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if count > 1:
            raise UserError(
                f"{self.stage}: out of memory in one of {count} processes, which must all cut their batches alike: "
                f"set {self.setting} below {self.size}"
            ) from error
        if rows <= 2**self.times:
            raise UserError(
                f"{self.stage}: memory does not suffice for a single {self.unit} at a time: train fewer weights "
                "(trainable: lora, or last_layers), or lower max_prompt_tokens and max_completion_tokens"
            ) from error

    def _halve(self) -> None:
        before, self.times = self.now, self.times + 1
        say(
            f"{self.stage}: out of memory: {self.setting} is halved from {before} to {self.now} for the rest of this "
            f"run, with the same result; set {self.setting}: {self.now} to avoid this"
        )


def _free() -> None:
    gc.collect()  # frames that hold one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

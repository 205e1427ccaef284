"""The processes that share one run: how they are found, and how they stay together when something fails in one of them.

Every process takes an equal share of each batch, so all of them run the same number of forward and backward passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object, parse_flag_from_env, patch_environment

from rlhf.types import ConfigError, UserError

T = TypeVar("T")


def join() -> Accelerator:
    """Meet the other processes that a launcher started; alone where there was none.

    Casting is ours (see ActorCritic), and so is sharding (see rlhf.sharding): accelerate is asked for neither. Raises
    ConfigError where the processes do not find one another, and for DeepSpeed.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "PPO does not run under DeepSpeed, whose engine takes the optimiser's steps by itself: use "
            "experiments/accelerate/fsdp2.yaml, which spreads the same over the GPUs"
        )
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    AcceleratorState._reset_state()  # SFT's trainer in the same process has fixed its own precision there
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=launched > 1 and not torch.cuda.is_available(),  # else accelerate leaves each process to itself
            # the value's warm-up uses no weight of the policy
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, but accelerate sees {accelerator.num_processes}: set "
            "ACCELERATE_USE_CPU=1 to run on the CPU, or use one of experiments/accelerate/*.yaml"
        )
    return accelerator


def share_of(batch_size: int, accelerator: Accelerator, *, samples: int = 1) -> range:
    """This process's rows of a batch of which `samples` neighbours belong together.

    Raises ConfigError for unequal shares: some processes would wait forever for the last steps of the others.
    """
    count = accelerator.num_processes
    share = batch_size // count
    if batch_size % count or share % samples:
        together = f" in groups of extras.rloo_samples = {samples}" if samples > 1 else ""
        raise ConfigError(
            f"batch_size is {batch_size}, which {count} processes cannot share equally{together}: "
            f"give a multiple of {count * samples}"
        )
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """The result of what may fail in one process and not in another: a reward, a full disk.

    All processes must call it. Where `action` fails in any, all of them raise, rather than wait for one that has gone:
    its own error there, and UserError with that error's text in the others.
    """
    if accelerator.num_processes == 1:
        return action()
    try:
        result = action()
    except Exception as error:
        gather_object([str(error) or type(error).__name__])
        raise
    failed = {rank: text for rank, text in enumerate(gather_object([""])) if text}
    for rank, text in failed.items():
        raise UserError(f"process {rank} failed: {text}")
    return result

"""Weights spread over the processes (FSDP2), and whole again where they are needed.

accelerate's configuration says whether: `distributed_type: FSDP`, `fsdp_version: 2`. torch's `fully_shard` does it,
because accelerate shards one model with its optimiser, and on a CPU silently none at all, while PPO has a policy, a
value and a reference, and is tested on CPUs. A sharded weight is a `DTensor`; what is written to disk is always whole,
so a run may go on with another number of processes.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf.types import ConfigError

_ONLY = {"reshard_after_forward": True, "activation_checkpointing": False}
"""Settings of accelerate's that are honoured as they are here, and refused otherwise."""


def is_wanted(accelerator: Accelerator) -> bool:
    """Whether accelerate was asked to shard, and there are processes to shard over.

    Raises ConfigError for settings that would not be honoured.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"fsdp_version is {version}, but only 2 is supported: set it so")
    asked = FullyShardedDataParallelPlugin()  # as the environment says, which `accelerate launch` sets
    for name, value in _ONLY.items():
        if getattr(asked, name) != value:
            raise ConfigError(f"fsdp_{name} is {getattr(asked, name)}, but only {value} is supported: set it so")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("fsdp_offload_params is true, but only false is supported: set it so")
    return accelerator.num_processes > 1


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Leave each process its part of every weight, in place and on its device.

    All start from the weights of the first process. A layer's weights are gathered while it computes, then let go.
    """
    # torch warns of outputs that are views, such as values without their last dimension: nobody changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for weight in module.parameters():
        of_first = weight.detach().to(accelerator.device)
        torch.distributed.broadcast(of_first, src=0)
        weight.data.copy_(of_first)
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where it is sharded: then every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, *, keep: bool) -> Any:
    """Dictionaries and lists with whole tensors in place of sharded ones, those on the CPU.

    Every process must call it; the ones that do not `keep` anything never hold more than one whole tensor.
    """
    if isinstance(value, DTensor):
        tensor = whole(value.detach())
        return tensor.cpu() if keep else None
    if isinstance(value, dict):
        return {name: gathered(part, keep=keep) for name, part in value.items()}
    return [gathered(part, keep=keep) for part in value] if isinstance(value, list) else value


def placed_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as `weight` is and on its device."""
    tensor = tensor.to(weight.device)
    if isinstance(tensor, DTensor) or not isinstance(weight, DTensor):
        return tensor
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


def optimizer_state_for(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole `state_dict` with what belongs to each weight spread as that weight is."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    spread = {
        index: {
            name: placed_like(part, weights[index]) if part.shape == weights[index].shape else part
            for name, part in of_weight.items()
        }
        for index, of_weight in state["state"].items()
    }
    return {**state, "state": spread}


def hollow(module: nn.Module) -> nn.Module:
    """The module without its weights: what `filled` needs once they are sharded."""
    empty = {id(weight): _parameter(weight.to("meta"), weight) for weight in module.parameters()}
    return copy.deepcopy(module, empty)


def filled(shell: nn.Module, module: nn.Module) -> nn.Module:
    """An ordinary module on the CPU with the whole weights of a sharded one; every process must call it."""
    pairs = zip(shell.parameters(), module.parameters(), strict=True)
    weights = {id(empty): _parameter(whole(weight.detach()).cpu(), weight) for empty, weight in pairs}
    return copy.deepcopy(shell, weights).to("cpu")


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=like.requires_grad)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists: a transformer's layers, not the experts inside one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)

"""What a PPO run changes from step to step, and how it is written down so that a resumed run equals an unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf import checkpoint, sharding
from rlhf.actor_critic import TokenModel
from rlhf.checkpoint import Checkpoint
from rlhf.processes import together


class TrainableModel(TokenModel, Protocol):
    """A `TokenModel` whose weights can be told apart: `ActorCritic`, or any other module with these parts."""

    policy: Any
    value: Any

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the policy."""
        ...

    def value_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the value, if there is one."""
        ...


class Learner:
    """Policy and value with their optimiser and learning-rate schedule, and the policy's moving average if wanted.

    `model` is the module itself; `forward` is what accelerate made of it (the same thing in one process, and with
    sharded weights). All processes must call what saves, and `trained_policy`.
    """

    def __init__(
        self,
        model: TrainableModel,
        *,
        learning_rate: float,
        value_learning_rate: float,
        steps: int,
        schedule: Literal["linear", "constant"] = "linear",
        ema_decay: float | None = None,
        accelerator: Accelerator,
    ):
        self.model = model
        self.accelerator = accelerator
        sharded = sharding.is_wanted(accelerator)
        self._shell = sharding.hollow(model.policy) if sharded else None
        if sharded:
            for module in filter(None, (model.policy, model.value)):
                sharding.shard(module, accelerator)
        groups = [
            {"params": model.policy_parameters(), "lr": learning_rate},
            {"params": model.value_parameters(), "lr": value_learning_rate},
        ]
        # Adam's epsilon and second moment as in Llama-2's PPO: see science.md 1a, row 4, on 1e-8 being too eager early
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=0.0,
            fused=not sharded,  # one pass over the weights instead of ten
        )
        scale = (lambda step: 1 - step / steps) if schedule == "linear" else (lambda step: 1.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        self.forward, self.optimizer = (model, optimizer) if sharded else accelerator.prepare(model, optimizer)
        self._ema_decay = ema_decay
        self.ema = {name: w.detach().clone() for name, w in self._policy_weights().items()} if ema_decay else {}

    def after_optimizer_step(self) -> None:
        """Let the moving average follow the policy."""
        for name, weight in self._policy_weights().items() if self.ema else ():
            self.ema[name].lerp_(weight.detach(), 1 - (self._ema_decay or 0))

    def use_average(self) -> None:
        """Put the moving average, where there is one, in the policy's place: the result of the run."""
        if self.ema:
            _load(self._policy_weights(), self.ema)

    def trained_policy(self) -> Any:
        """The policy as an ordinary module with whole weights: a copy where they are sharded."""
        return self.model.policy if self._shell is None else sharding.filled(self._shell, self.model.policy)

    def save(self, folder: Path, step: int, numbers: dict[str, Any]) -> None:
        """Write a checkpoint of everything that the next step depends on; no process goes on before it is there."""
        weights = {"policy": self._policy_weights(), "value": self._value_weights()}
        if self.ema:
            weights["ema"] = self.ema
        states = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": checkpoint.random_states(),
        }
        writes = self.accelerator.is_main_process
        weights, states = sharding.gathered(weights, keep=writes), sharding.gathered(states, keep=writes)

        def write() -> None:
            if writes:
                checkpoint.save(folder, step, weights=weights, states=states, numbers=numbers)

        together(self.accelerator, write)

    def restore(self, saved: Checkpoint) -> dict[str, Any]:
        """Go back to a checkpoint; returns its plain numbers."""
        _load(self._policy_weights(), saved.weights("policy"))
        _load(self._value_weights(), saved.weights("value"))
        if self.ema:
            _load(self.ema, saved.weights("ema"))
        states = saved.states()
        self.optimizer.load_state_dict(sharding.optimizer_state_for(self.optimizer, states["optimizer"]))
        self.schedule.load_state_dict(states["schedule"])
        checkpoint.restore_random_states(states["random"])
        if self.accelerator.is_main_process:
            checkpoint.remove_others(saved.path)
        return saved.numbers()

    def save_value(self, folder: Path) -> None:
        """Keep the value head or model beside the policy: a later run can go on from it."""
        writes = self.accelerator.is_main_process
        weights = sharding.gathered(self._value_weights(), keep=writes)
        if writes and weights:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
            save_file(tensors, folder / "value.safetensors")

    def _policy_weights(self) -> dict[str, Tensor]:
        return {name: w for name, w in self.model.policy.named_parameters() if w.requires_grad}

    def _value_weights(self) -> dict[str, Tensor]:
        value = self.model.value
        return {} if value is None else {name: w for name, w in value.named_parameters() if w.requires_grad}


@torch.no_grad()
def _load(weights: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(sharding.placed_like(saved[name], weight))

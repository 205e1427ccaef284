"""Policy and value as one module: a batch of sequences in, one number per completion token out.

Everything that PPO compares (old, new and reference logprobs) comes from this one forward pass, at one temperature and
in one precision. Dropout is off because the module stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf import ops
from rlhf.last_layer import last_layer_at
from rlhf.lm_head import LMHead
from rlhf.models import autocast, casting_once, keeps_logits, layers_of
from rlhf.sequences import Sequences
from rlhf.sharding import is_sharded
from rlhf.trunk import Trunk

Part = Literal["policy", "value"]


class TokenOutputs(NamedTuple):
    """Per completion token (B, T); what stands outside the completion mask is meaningless."""

    logprobs: Tensor
    """Of the completion's own tokens, at the module's temperature."""
    entropy: Tensor
    """Of the next-token distribution, in nats; carries no gradient."""
    values: Tensor
    """Expected return before each token; zeros without a value model."""


class TokenModel(Protocol):
    """What `rollout` and `ppo` need of a policy with its value: `ActorCritic`, or a table of logits in a test."""

    def __call__(self, batch: Sequences, *, train_policy: bool = True) -> TokenOutputs: ...


def one_by_one(model: Any) -> tuple[Part, ...]:
    """Parts of a model whose losses share no pass, so that the first one's is over before the next one's begins."""
    return ("policy", "value") if isinstance(model, ActorCritic) and isinstance(model.value, ValueModel) else ()


def passes_of(model: Any) -> AbstractContextManager[Any]:
    """Around several forward passes of a model between two optimiser steps: they share what can be shared."""
    model = getattr(model, "module", model)  # inside accelerate's wrapper
    return model.together() if isinstance(model, ActorCritic) else nullcontext()


class ActorCritic(nn.Module):
    """A causal language model with a value head, a separate value model, or no value at all (the reference)."""

    def __init__(
        self,
        policy: Any,
        value: ValueHead | ValueModel | None,
        *,
        temperature: float,
        dtype: torch.dtype,
        trunk: Trunk | None = None,
    ):
        super().__init__()
        self.policy = policy
        self.value = value
        self.temperature = temperature
        self.dtype = dtype
        self.trunk = trunk
        self._head = LMHead.of(policy)
        self.eval()

    def together(self) -> AbstractContextManager[Any]:
        """See `passes_of`."""
        weight = next(self.policy.parameters())
        # sharded weights are gathered anew for each pass
        return nullcontext() if is_sharded(weight) else casting_once(weight.device, self.dtype)

    def forward(self, batch: Sequences, *, train_policy: bool = True, only: Part | None = None) -> TokenOutputs:
        """Logprobs, entropy and values of the completion's tokens.

        The frozen lower layers are not run where the batch brings their states. With `train_policy=False` no gradient
        flows into the policy or its trunk: the warm-up of a new value head. With `only` one of `one_by_one(self)` runs,
        and the other's outputs are 0.
        """
        inputs = batch.model_inputs()
        if only == "value":
            values = self._of_critic(inputs, batch.completion_mask.shape[1])
            return TokenOutputs(torch.zeros_like(values), torch.zeros_like(values), values)
        with (
            nullcontext() if train_policy else torch.no_grad(),
            autocast(inputs["input_ids"].device, self.dtype),
            self.trunk.handing_on(self.policy, batch.trunk_states) if self.trunk else nullcontext(),
        ):
            # sharded weights are whole only inside the forward pass of the module that was sharded
            fuses = self._head is not None and not is_sharded(self._head.linear.weight)
            logprobs, entropy, hidden = (self._fused if fuses else self._whole)(batch, inputs)
        values = torch.zeros_like(logprobs) if only == "policy" else self._values(hidden, inputs, logprobs)
        return TokenOutputs(logprobs, entropy, values)

    def _fused(self, batch: Sequences, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs (B, T), entropy (B, T) and last hidden states (B, T, D); the LM head runs on real tokens only."""
        assert self._head is not None
        mask, tokens = batch.completion_mask, batch.completion_ids
        with self._head.sparse_embedding(), self._at_last(tokens.shape[1]):
            hidden = self._head.decoder(**inputs, use_cache=False).last_hidden_state[:, -tokens.shape[1] :]
        logprobs, entropy = self._head(hidden[mask], tokens[mask], temperature=self.temperature, dtype=self.dtype)
        empty = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
        return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy), hidden

    def _at_last(self, width: int) -> AbstractContextManager[Any]:
        """See `last_layer_at`; whole where the trunk holds the last layer too, whether or not it is handed on."""
        is_in_trunk = self.trunk is not None and self.trunk.depth == len(layers_of(self.policy)[1])
        return nullcontext() if is_in_trunk else last_layer_at(self.policy, width)

    def _whole(self, batch: Sequences, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the model's own logits."""
        logits, hidden = _logits_and_hidden(self.policy, inputs, batch.completion_ids.shape[1])
        logprobs = ops.token_logprobs(logits, batch.completion_ids, temperature=self.temperature)
        with torch.no_grad():
            entropy = ops.entropy(logits, temperature=self.temperature)
        return logprobs, entropy, hidden

    def _values(self, hidden: Tensor, inputs: dict[str, Tensor], logprobs: Tensor) -> Tensor:
        if self.value is None:
            return torch.zeros_like(logprobs)
        if isinstance(self.value, ValueHead):
            return self.value(hidden)
        return self._of_critic(inputs, hidden.shape[1])

    def _of_critic(self, inputs: dict[str, Tensor], width: int) -> Tensor:
        assert isinstance(self.value, ValueModel)
        with autocast(inputs["input_ids"].device, self.dtype):
            return self.value(inputs, width)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the policy."""
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the value head or model."""
        return [] if self.value is None else [weight for weight in self.value.parameters() if weight.requires_grad]


class ValueHead(nn.Module):
    """A linear read-out of the policy's last hidden state; 0 everywhere before training."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T) values in fp32 from hidden states (B, T, D), whatever precision those are in."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


class ValueModel(nn.Module):
    """A critic with a trunk of its own."""

    def __init__(self, backbone: Any, head: ValueHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    @staticmethod
    def from_classifier(classifier: Any) -> ValueModel:
        """Start from a reward model: its trunk, and its head with the calibration folded in (InstructGPT)."""
        inner = classifier.get_base_model() if hasattr(classifier, "peft_config") else classifier
        score = inner.score
        weight = next(w for name, w in score.named_parameters() if name.endswith("weight"))
        mean, std = getattr(inner.config, "score_mean", 0.0), getattr(inner.config, "score_std", 1.0)
        head = ValueHead(weight.shape[1])
        head.linear.weight.data = weight.detach().clone() / std
        head.linear.bias.data.fill_(-mean / std)
        return ValueModel(inner.base_model, head)

    def forward(self, inputs: dict[str, Tensor], width: int) -> Tensor:
        """(B, width) values at the last `width` positions."""
        with last_layer_at(self.backbone, width):
            return self.head(self.backbone(**inputs).last_hidden_state[:, -width:])


def _logits_and_hidden(policy: Any, inputs: dict[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the hidden states (B, T, D) they are read from, at the T last positions.

    The head runs on those positions only; what it was fed is the final hidden state of any architecture.
    """
    with _input_of(policy.get_output_embeddings()) as captured:
        if keeps_logits(policy):
            logits = policy(**inputs, logits_to_keep=width, use_cache=False).logits
        else:
            logits = policy(**inputs, use_cache=False).logits[:, -width:]
    return logits, captured[0][:, -width:]


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    captured: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        yield captured
    finally:
        handle.remove()

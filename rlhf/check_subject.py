"""What `rlhf check` examines: the source as it lies on disk, a policy put together as PPO does, and a reward model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf import models, rollout, text
from rlhf.actor_critic import ActorCritic, TokenOutputs, ValueHead
from rlhf.config import Trainable
from rlhf.contract import Contract
from rlhf.generation import Engine, Generated
from rlhf.learner import Learner
from rlhf.model_files import base_of, has_tokenizer, local_source
from rlhf.rollout import Rollout, Shaping
from rlhf.sequences import Sequences
from rlhf.types import Prompt, RewardFn, UserError
from rlhf.update import UpdateSettings, update

MAX_TOKENS = 6
"""Of a completion: enough for every invariant, and quick."""
SAMPLED_TOKENS = 24
"""Of a completion whose logprobs are compared with the sampler's: a mean needs more."""
LEARNING_RATE = 1e-3
PLAIN = ("The", "Why not", "It is a fine day", "One, two", "A story about the sea:", "Hello")
COMPLETIONS = (" good and funny.", " Bad", " I would not say so: it is 3.5 times as long.", " yes,\nand no")


@dataclass(frozen=True)
class Source:
    """A model as it lies on disk, before anything of this project has mended it."""

    folder: Path
    tokenizer: Any
    generation: dict[str, Any]
    """What its generation config sets."""
    config: Any

    @staticmethod
    def read(name: str) -> Source:
        """Read tokenizer and configs only; no weights."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        folder = local_source(name)
        base = base_of(folder)
        tokenizers = folder if has_tokenizer(folder) else base
        if base.is_dir() and not (base / "config.json").is_file():
            raise UserError(f"{base} has no config.json, so it is no model: give the folder that save_pretrained wrote")
        if tokenizers.is_dir() and not has_tokenizer(tokenizers):
            raise UserError(f"{tokenizers} has no tokenizer: save it beside the model with tokenizer.save_pretrained")
        try:
            generation = GenerationConfig.from_pretrained(str(base)).to_diff_dict()
        except OSError:
            generation = {}
        try:
            tokenizer, config = (
                kind.from_pretrained(str(at)) for kind, at in ((AutoTokenizer, tokenizers), (AutoConfig, base))
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read as a model: {str(error).splitlines()[0]}") from error
        return Source(folder, tokenizer, generation, config)

    def missing_weights(self) -> list[str]:
        """Names of the model's weights that its files do not hold."""
        from transformers import AutoModelForCausalLM

        load: Any = AutoModelForCausalLM.from_pretrained  # its return type does not know of loading info
        _, found = load(str(base_of(self.folder)), output_loading_info=True)
        return sorted(found["missing_keys"])


@runtime_checkable
class TrainedReward(Protocol):
    """A reward that is a sequence classifier: `reward_models.model.RewardModel`."""

    classifier: Any
    tokenizer: Any
    contract: Contract | None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]: ...

    def raw_scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class RewardSubject:
    """A reward with texts to score; `source` where it is a model's folder."""

    reward: RewardFn
    prompts: tuple[Prompt, ...]
    source: Source | None

    @cached_property
    def texts(self) -> tuple[list[Prompt], list[str]]:
        """Each prompt with a completion, ragged."""
        return list(self.prompts), [COMPLETIONS[i % len(COMPLETIONS)] for i in range(len(self.prompts))]

    @cached_property
    def rows(self) -> list[list[int]]:
        """The same as ids: prompt, completion, EOS, as short as in the reward model's training."""
        assert isinstance(self.reward, TrainedReward)
        tokenizer, contract = self.reward.tokenizer, self.reward.contract
        limit = contract.max_completion_tokens if contract else None
        return [
            text.encode_prompt(tokenizer, prompt) + text.encode_completion(tokenizer, completion, max_tokens=limit)
            for prompt, completion in zip(*self.texts, strict=True)
        ]


@dataclass(frozen=True)
class Subject:
    """A policy with its value, reference and sampler, as `rlhf ppo` puts them together. No check changes it."""

    policy: Any
    tokenizer: Any
    model: ActorCritic
    """The policy with a random value head: PPO's own starts at 0, which would hide every fault of the value."""
    engine: Engine
    prompts: tuple[Prompt, ...]
    temperature: float
    trainable: Trainable | None
    source: Source | None = None
    reward: RewardFn | None = None
    seed: int = 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a completion."""
        return models.eos_token_ids(self.policy, self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the policy lies."""
        return next(self.policy.parameters()).device

    @cached_property
    def in_fp32(self) -> ActorCritic:
        """The same weights, computed in fp32."""
        return computing_in_fp32(self.model)

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """The prompts; two more hold EOS and pad between their tokens, as a conversation does."""
        encoded = [text.encode_prompt(self.tokenizer, prompt) for prompt in self.prompts]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return [*encoded, [*encoded[0], eos, *encoded[1]], [*encoded[1], pad, eos, *encoded[0]]]

    @cached_property
    def sampled(self) -> list[Generated]:
        """A completion for each prompt by the engine, at the rollout's temperature."""
        self.engine.sync()
        generator = torch.Generator().manual_seed(self.seed)
        return self.engine.generate(
            self.prompt_ids, max_tokens=SAMPLED_TOKENS, temperature=self.temperature, generator=generator
        )

    @cached_property
    def ragged(self) -> list[Generated]:
        """The same, cut to lengths of 1 to MAX_TOKENS; every second one is ended by EOS."""
        eos = self.tokenizer.eos_token_id
        cut = [drawn.ids[: 1 + i % MAX_TOKENS] for i, drawn in enumerate(self.sampled)]
        rows = [[*ids[:-1], eos] if i % 2 else ids for i, ids in enumerate(cut)]
        return [Generated(ids, [0.0] * len(ids), ids[-1] in self.eos_token_ids) for ids in rows]

    @cached_property
    def rollout(self) -> Rollout:
        """The ragged completions as PPO's own `collect` prepares them, in fp32, with scores that differ."""
        return rollout.collect(
            prompts=["" for _ in self.prompt_ids],
            prompt_ids=self.prompt_ids,
            engine=_Replay(self.ragged),
            decode=lambda ids: text.decode_completion(self.tokenizer, ids),
            reward=_alternating,
            model=self.in_fp32,
            ref_model=reference_of(self.in_fp32),
            shaping=Shaping(kl_coef=0.05),
            max_tokens=MAX_TOKENS,
            temperature=self.temperature,
            micro_batch_size=len(self.prompt_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            generator=torch.Generator(),
            device=self.device,
        )

    @property
    def sequences(self) -> Sequences:
        """Prompts and completions alone."""
        names = ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths")
        return Sequences(**{name: getattr(self.rollout, name) for name in names})

    @cached_property
    def stepped(self) -> Step:
        """A twin after PPO's own update on the rollout."""
        return _step(self)


@dataclass(frozen=True)
class Step:
    """What an optimiser step (two of LoRA) did to a twin of the subject, which shares its frozen weights."""

    model: ActorCritic
    moved: frozenset[str]
    """Names of the policy's weights that changed."""
    gradients: dict[str, Tensor]
    """Of the last step, by name."""
    reference_gap: float
    """Largest change of the reference's logprobs."""
    trunk_gap: float | None
    """Largest change of what enters the lowest trained layer (or head); None where nothing is frozen below."""


class GradientReader(Learner):
    """A learner that keeps the gradients of its last optimiser step; a learning rate of 0 takes none."""

    def __init__(self, model: ActorCritic, *, learning_rate: float):
        rates = {"learning_rate": learning_rate, "value_learning_rate": learning_rate, "schedule": "constant"}
        super().__init__(model, **rates, steps=1, accelerator=Accelerator(mixed_precision="no"))
        self._named = dict(model.named_parameters())
        if not learning_rate:
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # AdamW would fill two more copies

    def after_optimizer_step(self) -> None:
        """Called after the step and before the gradients are cleared."""
        self.gradients = {name: w.grad.detach().clone() for name, w in self._named.items() if w.grad is not None}


def _alternating(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    return [(-1.0) ** i * (1 + i) for i in range(len(prompts))]


class _Replay:
    """An engine that hands out completions given beforehand."""

    def __init__(self, completions: list[Generated]):
        self._completions = completions
        self.batch_size = len(completions)

    def sync(self) -> None: ...

    def rest(self) -> None: ...

    def generate(self, prompts: Any, **_: Any) -> list[Generated]:
        return self._completions


def computing_in_fp32(model: ActorCritic) -> ActorCritic:
    """The same module in another precision; weights are shared."""
    twin = copy.copy(model)
    twin.dtype = torch.float32
    return twin


def reference_of(model: ActorCritic) -> ActorCritic:
    """PPO's reference of this policy."""
    frozen = models.frozen_copy(model.policy)
    return ActorCritic(frozen, None, temperature=model.temperature, dtype=model.dtype)


def random_value_head(policy: Any) -> ValueHead:
    """Values of about unit size."""
    head = ValueHead(policy.get_output_embeddings().weight.shape[1])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        head.linear.weight.copy_(
            torch.randn(head.linear.weight.shape, generator=generator) / head.linear.in_features**0.5
        )
    return head


def measured(model: ActorCritic, batch: Sequences, micro_batch_size: int | None = None) -> TokenOutputs:
    """What PPO's rollout measures, in micro-batches of this size (None: all at once)."""
    return rollout.measure(model, batch, rollout.partition(batch, micro_batch_size or len(batch)))


def run_update(
    model: ActorCritic, batch: Rollout, *, micro_batch_size: int, learning_rate: float, epochs: int = 1
) -> dict[str, Tensor]:
    """PPO's own update with one minibatch an epoch; returns the last gradients, unclipped."""
    old = measured(model, batch, micro_batch_size)
    learner = GradientReader(model, learning_rate=learning_rate)
    settings = UpdateSettings(
        num_ppo_epochs=epochs,
        num_mini_batches=1,
        micro_batch_size=micro_batch_size,
        cliprange=0.2,
        cliprange_value=None,
        vf_coef=0.1,
        max_grad_norm=float("inf"),
    )
    batch = replace(batch, logprobs=old.logprobs, values=old.values)
    update(learner, batch, settings=settings, generator=torch.Generator().manual_seed(0))
    return learner.gradients


def trunk_states(policy: Any, batch: Sequences) -> Tensor | None:
    """What enters the lowest trained layer, or the head where no layer is trained; None where nothing lies below."""
    inner, layers, depth = _trunk_of(policy)
    if depth == 0:
        return None
    return _entering(layers[depth] if depth < len(layers) else inner.get_output_embeddings(), inner, batch)


@torch.no_grad()
def branch_gap(policy: Any, batch: Sequences) -> float:
    """Largest change of a logit when the frozen layers hand on the output of their highest one instead of computing."""
    inner, layers, depth = _trunk_of(policy)
    inputs, reached = batch.model_inputs(), []
    hook = layers[depth - 1].register_forward_hook(lambda _, __, output: reached.append(output))
    whole = inner(**inputs, use_cache=False).logits
    hook.remove()
    for layer in layers[:depth]:
        layer.forward = lambda *_, **__: reached[0]
    try:
        branch = inner(**inputs, use_cache=False).logits
    finally:
        for layer in layers[:depth]:
            del layer.forward  # the class's own shows again
    return largest((branch - whole)[inputs["attention_mask"].bool()])


def _trunk_of(policy: Any) -> tuple[Any, Any, int]:
    """The bare model, its layers, and how many of them are frozen below all that is trained."""
    inner = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    return inner, models.layers_of(inner)[1], models.frozen_depth(inner)


@torch.no_grad()
def _entering(module: nn.Module, model: Any, batch: Sequences) -> Tensor:
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**batch.model_inputs(), use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def _step(subject: Subject) -> Step:
    batch = subject.rollout
    model = models.trainable_copy(subject.in_fp32)
    reference = reference_of(model)
    policy_weights = dict(model.policy.named_parameters())
    before = {name: weight.detach().clone() for name, weight in policy_weights.items()}
    reference_before, trunk_before = measured(reference, batch).logprobs, trunk_states(model.policy, batch)
    epochs = 2 if hasattr(model.policy, "peft_config") else 1  # LoRA's A has a gradient once its B is not 0
    gradients = run_update(model, batch, micro_batch_size=len(batch), learning_rate=LEARNING_RATE, epochs=epochs)
    trunk_after = trunk_states(model.policy, batch)
    return Step(
        model=model,
        moved=frozenset(name for name, weight in policy_weights.items() if not torch.equal(before[name], weight)),
        gradients=gradients,
        reference_gap=largest(measured(reference, batch).logprobs - reference_before),
        trunk_gap=None if trunk_before is None or trunk_after is None else largest(trunk_after - trunk_before),
    )


def largest(x: Tensor) -> float:
    """The largest absolute value."""
    return float(x.detach().abs().max())

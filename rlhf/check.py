"""The invariants of PPO, run on the user's own model, tokenizer, chat template and reward.

`run` is the command `rlhf check`: it loads everything as the stages do and looks at it once for each `trainable`.
`examine` takes objects. The lists below name what is checked; what must hold is each function's docstring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf import check_policy, check_reward, check_text, data, models, text
from rlhf.actor_critic import ActorCritic
from rlhf.check_report import Finding, Report, Result, failed
from rlhf.check_subject import PLAIN, RewardSubject, Source, Subject, TrainedReward, random_value_head
from rlhf.config import CheckConfig, LastLayers, Lora, Trainable, needed
from rlhf.generation import Engine
from rlhf.generation.choice import engine_for
from rlhf.progress import progress
from rlhf.types import DataError, Prompt, RewardFn

Check = Callable[[Any], Finding]

TEXT: tuple[Check, ...] = (
    check_text.weights,
    check_text.pad,
    check_text.bos,
    check_text.eos,
    check_text.end_of_turn,
    check_text.template,
    check_text.boundary,
    check_text.contract,
    check_text.generation_config,
)
"""Once for a model."""
POLICY: tuple[Check, ...] = (
    check_policy.dropout,
    check_policy.ratio,
    check_policy.padding,
    check_policy.sampler,
    check_policy.stops,
    check_policy.eos_loss,
    check_policy.accumulation,
    check_policy.gradients,
    check_policy.frozen,
    check_policy.trunk,
    check_policy.reference,
    check_policy.save,
)
"""Once for each `trainable`."""
REWARD: tuple[Check, ...] = (
    check_reward.scores,
    check_reward.head,
    check_reward.position,
    check_reward.padding,
    check_reward.pad,
    check_reward.reload,
    check_reward.dropout,
    check_reward.calibration,
)
"""Once for a reward; a function that is no model is only asked for its scores."""


def run(config: CheckConfig, *, load_reward: Callable[[str], RewardFn]) -> Report:
    """Check the model and reward that `config` names. `load_reward` must not refuse a contract: that is checked here.

    Raises UserError for what cannot be loaded.
    """
    name, started = needed(config.model, "model", "the model to check"), time.perf_counter()
    source = Source.read(name)
    tokenizer = models.load_tokenizer(name, trusting=True)  # the contract is one of the checks
    reward = load_reward(config.reward) if config.reward else None
    prompts = _prompts(config, tokenizer)
    trainables: list[Trainable] = [config.trainable] if config.trainable else _all_trainables(source)
    results: list[Result] = []
    with progress("check", total=len(trainables) + bool(reward)) as bar:
        for trainable in trainables:
            policy = models.load_policy(name, tokenizer, trainable=trainable).to(models.device())
            subject = subject_of(
                config, policy=policy, tokenizer=tokenizer, prompts=prompts, trainable=trainable, reward=reward
            )
            results += _of_policy(replace(subject, source=source), once=not results)
            del policy, subject
            bar.advance()
        if reward:
            results += _of_reward(reward, prompts, config.reward)
            bar.advance()
    return _report(config, results, started)


def examine(
    config: CheckConfig,
    *,
    policy: Any,
    tokenizer: Any,
    trainable: Trainable | None,
    model: ActorCritic | None = None,
    engine: Engine | None = None,
    reward: RewardFn | None = None,
) -> Report:
    """Check objects as they are: a policy whose trainable weights are chosen, and if given its ActorCritic and engine.

    What the source's files hold is read only where `config.model` and `config.reward` name them.
    """
    started, prompts = time.perf_counter(), _prompts(config, tokenizer)
    subject = subject_of(
        config,
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        trainable=trainable,
        model=model,
        engine=engine,
        reward=reward,
    )
    if config.model:
        subject = replace(subject, source=Source.read(config.model))
    results = list(_of_policy(subject, once=True))
    if reward:
        results += _of_reward(reward, prompts, config.reward)
    return _report(config, results, started)


def subject_of(
    config: CheckConfig,
    *,
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    trainable: Trainable | None,
    model: ActorCritic | None = None,
    engine: Engine | None = None,
    reward: RewardFn | None = None,
) -> Subject:
    """Policy, value and sampler put together as PPO does."""
    where = next(policy.parameters()).device
    dtype = models.compute_dtype(config.precision, where)
    if model is None:
        model = ActorCritic(policy, random_value_head(policy).to(where), temperature=config.temperature, dtype=dtype)
    if engine is None:
        engine = engine_for(
            policy,
            eos_token_ids=models.eos_token_ids(policy, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            dtype=dtype,
            batch_size=64,
        )
    return Subject(
        policy=policy,
        tokenizer=tokenizer,
        model=model,
        engine=engine,
        prompts=tuple(prompts),
        temperature=config.temperature,
        trainable=trainable,
        reward=reward,
        seed=config.seed,
    )


# ---------------------------------------------------------------- parts


def _of_policy(subject: Subject, *, once: bool) -> Iterator[Result]:
    for check in TEXT if once else ():
        yield _result(check, subject)
    for check in POLICY:
        yield _result(check, subject, trainable=_name(subject.trainable))


def _of_reward(reward: RewardFn, prompts: Sequence[Prompt], name: str | None) -> Iterator[Result]:
    source = Source.read(name) if name and isinstance(reward, TrainedReward) else None
    conversation = isinstance(reward, TrainedReward) and reward.tokenizer.chat_template
    more = [check_text.CONVERSATION] if conversation else []
    subject = RewardSubject(reward, (*prompts, *more), source)
    for check in REWARD:
        yield _result(check, subject, prefix="reward_")


def _result(check: Check, subject: Any, *, trainable: str | None = None, prefix: str = "") -> Result:
    started = time.perf_counter()
    try:
        finding = check(subject)
    except Exception as error:  # what breaks one check is its finding, and must not hide the others'
        reason = f"{type(error).__name__}: {error}"
        finding = failed(f"it could not be measured, {reason}", "mend what the message names, then check again")
    seconds = time.perf_counter() - started
    title = " ".join((check.__doc__ or "").split())
    return Result(prefix + check.__name__, title, trainable, finding, seconds)


def _report(config: CheckConfig, results: list[Result], started: float) -> Report:
    dtype = models.compute_dtype(config.precision, models.device())
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    seconds = round(time.perf_counter() - started, 1)
    return Report(config.model or "(in memory)", config.reward, precision, tuple(results), seconds)


def _all_trainables(source: Source) -> list[Trainable]:
    """The four techniques; of the layers, the upper half is trained."""
    depth = source.config.get_text_config().num_hidden_layers
    return ["full", "lora", LastLayers(max(1, depth // 2)), "head"]


def _name(trainable: Trainable | None) -> str:
    if isinstance(trainable, LastLayers):
        return f"last_layers {trainable.last_layers}"
    return f"lora {trainable.lora_rank}" if isinstance(trainable, Lora) else str(trainable)


def _prompts(config: CheckConfig, tokenizer: Any) -> list[Prompt]:
    """Some of the user's prompts, short to long, or built-in ones."""
    if config.prompts is None:
        return list(PLAIN)
    read = data.distinct(data.read_prompts(config.prompts, config.columns))
    _, kept = text.encode_prompts(tokenizer, read, max_tokens=config.max_prompt_tokens)
    by_length = sorted((read[i] for i in kept), key=lambda prompt: len(text.encode_prompt(tokenizer, prompt)))
    if len(by_length) < 2:
        raise DataError(f"{config.prompts} has {len(by_length)} prompts that can be used: give at least 2")
    return by_length[:: -(-len(by_length) // len(PLAIN))]

"""Two policies asked the same thing with the same random numbers, and what the reward says of each answer.

With one seed both policies invert the same uniform numbers, so that where their answers differ, the policies do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rlhf import contract as contracts
from rlhf import models, ops, text
from rlhf.actor_critic import ActorCritic
from rlhf.chat_sources import Found, find
from rlhf.config import ChatConfig, Precision, require
from rlhf.contract import Contract, check_same_template
from rlhf.generation import Engine, Generated
from rlhf.model_files import local_source
from rlhf.progress import progress, say
from rlhf.rollout import measure
from rlhf.run_folder import append_record, open_to_append
from rlhf.sample import choose_prompts, sampler
from rlhf.scoring import checked_scores
from rlhf.sequences import Sequences
from rlhf.types import DataError, Message, Prompt, RewardFn, UserError

EXAMPLES = 256
DEFAULT_TOKENS = 256
SEEDS = 2**32


@dataclass(frozen=True)
class Question:
    """What a person asks, and how it is to be answered. Raises ConfigError for numbers that cannot be used."""

    text: str
    conversation: bool = False
    """Whether it goes through the chat template, after what was said before."""
    temperature: float = 1.0
    max_tokens: int = DEFAULT_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("temperature", int | float, 0.01, 100)
        self._require("max_tokens", int, 1, 100_000)
        self._require("seed", int, 0, SEEDS - 1)

    def _require(self, name: str, kind: Any, low: float, high: float) -> None:
        value = getattr(self, name)
        holds = isinstance(value, kind) and low <= value <= high
        require(holds, name.replace("_", " "), value, f"a number from {low} to {high}")


@dataclass(frozen=True)
class Answer:
    """What one policy wrote."""

    name: str
    prompt: Prompt
    """What it continued; in a conversation, with its own earlier answers."""
    text: str
    tokens: int
    """EOS included."""
    finished: bool
    """Whether it ended by itself (EOS) rather than at the limit."""
    seconds: float
    score: float | None = None
    """By the reward, calibrated; None where there is none."""
    log_ratio: float | None = None
    """log p(policy) - log p(baseline) of this answer, in nats. Over the policy's answers its mean is the KL."""


@dataclass(frozen=True)
class Exchange:
    """A question with the answers so far, the baseline's first."""

    question: Question
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Talk:
    """All exchanges since the last reset, the first one first."""

    exchanges: tuple[Exchange, ...] = ()
    opening: tuple[Message, ...] = ()
    """Turns before the first question, where an example brings some."""

    def prompt(self, side: int, question: Question) -> Prompt:
        """What the policy at this place is to continue: the text, or the conversation with its own answers."""
        if not question.conversation:
            return question.text
        turns: list[Message] = list(self.opening)
        for exchange in self.exchanges:
            if exchange.question.conversation:
                turns.append({"role": "user", "content": exchange.question.text})
                turns.append({"role": "assistant", "content": exchange.answers[side].text})
        return [*turns, {"role": "user", "content": question.text}]

    def plus(self, exchange: Exchange) -> Talk:
        """The talk with one exchange more."""
        return replace(self, exchanges=(*self.exchanges, exchange))

    def without_last(self) -> Talk:
        """The talk as it was before the last exchange."""
        return replace(self, exchanges=self.exchanges[:-1])


@dataclass(frozen=True)
class Side:
    """A policy that is ready to answer."""

    name: str
    source: str
    model: Any
    tokenizer: Any
    engine: Engine
    contract: Contract


class Chat:
    """One or two loaded policies and a reward. May be asked by several threads; it answers one at a time."""

    def __init__(
        self,
        sides: Sequence[Side],
        reward: RewardFn | None = None,
        *,
        precision: Precision = "auto",
        reward_source: str | None = None,
        examples: Sequence[Prompt] = (),
        log: Path | None = None,
    ) -> None:
        """`sides` are the baseline and the policy, or one policy; `log` is the file that keeps the exchanges.

        Raises ContractError for policies that would read one conversation differently.
        """
        self.sides, self.reward, self.reward_source, self.log = tuple(sides), reward, reward_source, log
        self.can_converse = all(side.tokenizer.chat_template for side in sides)
        self.examples = tuple(each for each in examples if self._can_ask(each))
        self._dtype = models.compute_dtype(precision, models.device())
        self._lock = threading.Lock()
        if len(sides) == 2:
            one, other = sides
            check_same_template(one.contract, other.contract, mine_name=one.name, theirs_name=other.name)

    @property
    def max_tokens(self) -> int:
        """What the page starts with."""
        return self.sides[-1].contract.max_completion_tokens

    def ask(self, question: Question, talk: Talk) -> Iterator[Exchange]:
        """The exchange, once for every answer more; what is complete is kept in the log. Raises UserError."""
        if not question.text.strip():
            raise DataError("there is no prompt yet: write one, or take an example")
        exchange = Exchange(question)
        for place, side in enumerate(self.sides):
            answer = self._answer(side, talk.prompt(place, question), question)
            exchange = replace(exchange, answers=(*exchange.answers, answer))
            if len(exchange.answers) < len(self.sides):
                yield exchange
        problem = self._keep(exchange)
        yield exchange
        if problem:
            raise problem

    def _can_ask(self, prompt: Prompt) -> bool:
        return isinstance(prompt, str) or (self.can_converse and bool(prompt) and prompt[-1]["role"] == "user")

    def _answer(self, side: Side, prompt: Prompt, question: Question) -> Answer:
        ids, temperature = _encoded(side, prompt, question.max_tokens), float(question.temperature)
        with self._lock:
            started = time.perf_counter()
            (generated,) = side.engine.generate(
                [ids],
                max_tokens=question.max_tokens,
                temperature=temperature,
                generator=torch.Generator().manual_seed(question.seed),
            )
            seconds = time.perf_counter() - started
            completion = text.decode_completion(side.tokenizer, generated.ids)
            score = checked_scores(self.reward, [prompt], [completion])[0] if self.reward else None
            log_ratio = self._log_ratio(ids, generated, temperature)
        tokens, finished = len(generated.ids), generated.finished
        return Answer(side.name, prompt, completion, tokens, finished, round(seconds, 3), score, log_ratio)

    def _log_ratio(self, ids: Sequence[int], generated: Generated, temperature: float) -> float | None:
        """See `Answer.log_ratio`; None for a policy alone, and where the same ids are other text to the other one."""
        if len(self.sides) < 2 or not self.sides[0].contract.shares_text_with(self.sides[1].contract):
            return None
        baseline, policy = (self._logprobs(side, ids, generated, temperature) for side in self.sides)
        return float(ops.kl_k1(policy, baseline).double().sum())

    def _logprobs(self, side: Side, ids: Sequence[int], generated: Generated, temperature: float) -> torch.Tensor:
        batch = Sequences.from_lists([ids], [generated.ids], pad=side.tokenizer.pad_token_id).to(models.device())
        model = ActorCritic(side.model, None, temperature=temperature, dtype=self._dtype)
        return measure(model, batch, [torch.tensor([0], device=models.device())]).logprobs

    def _keep(self, exchange: Exchange) -> UserError | None:
        """Add a line to the log; returns what kept it from being written."""
        if self.log is None:
            return None
        record = {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **asdict(exchange),
            "models": {side.name: side.source for side in self.sides},
            "reward": self.reward_source,
        }
        try:
            with self._lock, open_to_append(self.log) as file:
                append_record(file, record)
        except OSError as error:
            return DataError(f"this exchange is not kept: {self.log} cannot be written ({error.strerror})")
        return None


def load(config: ChatConfig, *, load_reward: Callable[[str, Contract], RewardFn]) -> Chat:
    """Load what the config names, once. Raises ConfigError or UserError for what is missing or does not fit."""
    found = find(config)
    if len(found.policies) == 1:
        say(f"chat: there is no second policy, so {found.policies[0][0]} ({found.policies[0][1]}) answers alone")
    with progress("load", total=len(found.policies) + bool(found.reward)) as bar:
        sides = []
        for name, source in found.policies:
            sides.append(_load_side(name, source, config))
            bar.advance()
        reward = None
        if found.reward:
            reward = load_reward(found.reward, sides[-1].contract)
            bar.advance()
    if found.log:
        found.log.parent.mkdir(parents=True, exist_ok=True)
    return Chat(
        sides,
        reward,
        precision=config.precision,
        reward_source=found.reward,
        examples=_examples(found, seed=config.seed),
        log=found.log,
    )


def context_of(model: Any) -> int | None:
    """The longest sequence that the model reads, in tokens; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _load_side(name: str, source: str, config: ChatConfig) -> Side:
    tokenizer = models.load_tokenizer(source)
    model = models.load_policy(source, tokenizer).to(models.device())
    trained = contracts.load(local_source(source))
    room = min(DEFAULT_TOKENS, (context_of(model) or 2 * DEFAULT_TOKENS) // 2)
    limit = config.max_completion_tokens or (trained.max_completion_tokens if trained else room)
    contract = text.contract_of(
        tokenizer,
        eos_token_ids=models.eos_token_ids(model, tokenizer),
        max_prompt_tokens=trained.max_prompt_tokens if trained else room,
        max_completion_tokens=limit,
    )
    engine = sampler(model, tokenizer, precision=config.precision, batch_size=1)
    return Side(name, source, model, tokenizer, engine, contract)


def _examples(found: Found, *, seed: int) -> list[Prompt]:
    """Some prompts in an order drawn with the seed; none where they can no longer be read, which ends nothing."""
    if found.prompts is None:
        return []
    split = "held_out" if found.held_out else "all"
    try:
        return choose_prompts(
            found.prompts, found.columns, split=split, held_out=found.held_out, count=EXAMPLES, seed=seed
        )
    except UserError as error:
        if found.prompts_are_asked_for:
            raise
        say(f"chat: no examples, because the run's prompts cannot be read any more: {error}")
        return []


def _encoded(side: Side, prompt: Prompt, to_come: int) -> list[int]:
    """Ids of the prompt; raises DataError where the model has no room for it and `to_come` tokens more."""
    ids = text.encode_prompt(side.tokenizer, prompt)
    if not ids:
        raise DataError("the prompt has no tokens: write something to continue")
    context = context_of(side.model)
    if context is not None and len(ids) + to_come > context:
        raise DataError(
            f"{side.name} reads {context} tokens, but the prompt has {len(ids)} and up to {to_come} are to come: "
            "shorten it, ask for fewer, or reset the conversation"
        )
    return ids

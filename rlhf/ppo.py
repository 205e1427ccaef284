"""Proximal policy optimisation from a reward, held near a reference by KL.

Schulman et al. 2017 with the details of Ziegler et al. 2019 and Stiennon et al. 2020. `train` is the loop; its steps
are `rollout.collect` and `update.update`. `run` is the stage: it loads, trains, and leaves an ordinary model folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any, TypedDict, cast

import torch

from rlhf import alarms, checkpoint, data, models, ops, processes, rollout, sharding, text
from rlhf.actor_critic import ActorCritic, ValueHead, ValueModel
from rlhf.config import PPOConfig, needed
from rlhf.contract import Contract
from rlhf.contract import load as load_contract
from rlhf.generation.choice import engine_for
from rlhf.kl_control import AdaptiveKL, FixedKL, KLController
from rlhf.learner import Learner
from rlhf.origin import check_origin, origin_of
from rlhf.out_of_memory import Halving
from rlhf.progress import progress, say
from rlhf.report_data import Fact, ReportData, write_report_data
from rlhf.rollout import Rollout, Shaping, collect
from rlhf.sequences import Sequences
from rlhf.stopping import Stopped, stop_request
from rlhf.stopwatch import Stopwatch
from rlhf.tracking import Tracker
from rlhf.trunk import Trunk
from rlhf.types import ConfigError, DataError, Prompt, RewardFn, SharesWeights, TrunkReward, UserError, prompt_text
from rlhf.update import UpdateSettings, reducer, update

ALARM_AGAIN_AFTER = 20
"""Steps for which the same alarm is not raised again."""


# ---------------------------------------------------------------- the loop


@dataclass(frozen=True)
class PPOResult:
    """What a run leaves behind."""

    policy: Any
    """The trained model, in memory."""
    model_folder: Path
    """The same on disk, as an ordinary Hugging Face or PEFT folder."""
    metrics: dict[str, float]
    """Of the last step."""


def train(
    config: PPOConfig,
    *,
    policy: Any,
    tokenizer: Any,
    reward: RewardFn,
    prompts: Sequence[Prompt],
    value: ValueHead | ValueModel | None = None,
) -> PPOResult:
    """Optimise `policy` (its trainable weights) against `reward` on `prompts`, and write the run to `config.output`.

    `policy` is also the reference: a frozen copy is taken at the start, so give it as it was then. In bf16, linear
    layers under an adapter that is written by itself are held in bf16 from then on. `value=None` makes a new value head
    on the policy's trunk, or none at all with `extras.rloo_samples`. An interrupted run goes on from its
    last checkpoint and ends as if it had never stopped. SIGTERM and Ctrl-C let the step finish, save and raise Stopped.
    Raises UserError for prompts, rewards or weights that cannot be used, and for checkpoints of another training.
    """
    folder, steps = Path(config.output), config.total_episodes // config.batch_size
    task = Task(config, policy=policy, tokenizer=tokenizer, reward=reward, prompts=prompts, value=value)
    saved = checkpoint.latest(folder / "checkpoints")
    check_origin(saved.numbers().get("origin") if saved else None, task.origin, folder / "checkpoints")
    state = task.learner.restore(saved) if saved else {"step": 0, "kl_coef": config.kl_coef, "running": {}}
    kl_controller = _kl_controller(config, state["kl_coef"])
    metrics, running = state.get("metrics", {}), state["running"]
    with (
        Tracker(
            folder, stage="ppo", config=config, tracking=config.tracking, resume_step=saved.step if saved else None
        ) as tracker,
        progress("ppo", total=steps, done=state["step"]) as bar,
        stop_request() as stop,
    ):
        for step in range(state["step"], steps):
            watch = Stopwatch()
            batch = task.rollout(step, kl_coef=kl_controller.value, lap=watch.lap)
            updated = task.update(step, batch, kl_coef=kl_controller.value)
            of_rollout = task.metrics(batch, kl_coef=kl_controller.value)
            metrics = {
                **of_rollout,
                **updated,
                "objective/kl_coef": kl_controller.value,
                "lr": task.learner.schedule.get_last_lr()[0],
                "episode": (step + 1) * config.batch_size,
                "tokens": metrics.get("tokens", 0) + round(of_rollout["gen/length_mean"] * config.batch_size),
            }
            running = running or {"start": {name: metrics[name] for name in alarms.COMPARED_WITH_START}, "alarmed": {}}
            kl_controller.update(metrics["objective/kl"], config.batch_size)
            task.learner.schedule.step()
            watch.lap("update")
            tracker.log(metrics | _timings(watch.seconds, config.batch_size), step=step + 1)
            _report_samples(tracker, batch, step + 1, steps)
            _raise_alarms(tracker, metrics, running, step)
            bar.advance(1, score=metrics["objective/scores"], kl=metrics["objective/kl"])
            stopping = task.anywhere(bool(stop))
            if stopping or (step + 1) % config.save_every == 0 or step + 1 == steps:
                task.learner.save(
                    folder / "checkpoints",
                    step + 1,
                    {"kl_coef": kl_controller.value, "running": running, "metrics": metrics, "origin": task.origin},
                )
            if stopping:
                raise Stopped(f"step {step + 1} of {steps} is saved: run it again to go on", stop.signum or SIGTERM)
        return _finish(task, config, metrics, running["start"], tracker)


class Task:
    """The parts of one run, put together once; `rollout` and `update` are the two halves of a step."""

    def __init__(
        self,
        config: PPOConfig,
        *,
        policy: Any,
        tokenizer: Any,
        reward: RewardFn,
        prompts: Sequence[Prompt],
        value: ValueHead | ValueModel | None,
    ):
        self.accelerator = processes.join()
        self.rows = processes.share_of(config.batch_size, self.accelerator, samples=config.extras.rloo_samples or 1)
        self.config, self.tokenizer, self.reward = config, tokenizer, reward
        self.reduce = reducer(self.accelerator)
        device = self.accelerator.device
        dtype = models.compute_dtype(config.precision, device)
        _check_usable(policy, prompts)
        ids, kept = text.encode_prompts(tokenizer, prompts, max_tokens=config.max_prompt_tokens)
        self.prompts, self.prompt_ids = [prompts[i] for i in kept], ids
        models.check_context(policy, max(map(len, ids)) + config.max_completion_tokens, "a prompt with its completion")
        if len(kept) < len(prompts):
            say(
                f"ppo: {len(prompts) - len(kept)} of {len(prompts)} prompts are longer than max_prompt_tokens: left out"
            )
        self.contract = models.model_contract(
            policy,
            tokenizer,
            max_prompt_tokens=config.max_prompt_tokens,
            max_completion_tokens=config.max_completion_tokens,
        )
        sharded = sharding.is_wanted(self.accelerator)
        start = torch.device("cpu") if sharded else device  # what is sharded need never lie on one device as a whole
        policy.to(start).eval()
        if value is None and config.extras.rloo_samples is None:
            value = ValueHead(policy.get_output_embeddings().weight.shape[1])
        self.engine = engine_for(
            policy,
            eos_token_ids=self.contract.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            dtype=dtype,
            batch_size=config.rollout_batch_size,
            own_copy=device if sharded else None,
        )
        self.engine.rest()  # until the first rollout, so that its memory serves what is made below
        self.origin = origin_of(config, ids, policy)
        ref_policy = models.frozen_copy(policy)
        self.trunk = None if sharded else Trunk.of(policy, dtype)
        shares = self.trunk is not None and isinstance(reward, TrunkReward) and reward.on_trunk(self.contract)
        self.trunk_reward = cast(TrunkReward, reward) if shares else None
        self.ref_model = ActorCritic(ref_policy, None, temperature=config.temperature, dtype=dtype, trunk=self.trunk)
        if sharded:
            sharding.shard(ref_policy, self.accelerator)
        self.learner = Learner(
            ActorCritic(policy, value, temperature=config.temperature, dtype=dtype, trunk=self.trunk).to(start),
            learning_rate=config.learning_rate,
            value_learning_rate=_value_learning_rate(config, value),
            steps=config.total_episodes // config.batch_size,
            schedule=config.schedule,
            ema_decay=config.extras.ema_decay,
            accelerator=self.accelerator,
        )
        if not sharded:
            self._hold_less(ref_policy, dtype)
        self.halving = Halving.of_micro_batches(config.micro_batch_size, config.micro_batch_tokens)
        self.demonstrations = _demonstrations(config, tokenizer)
        self.settings = UpdateSettings(
            num_ppo_epochs=config.num_ppo_epochs,
            num_mini_batches=config.num_mini_batches,
            micro_batch_size=config.micro_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            max_grad_norm=config.max_grad_norm,
            dual_clip=config.extras.dual_clip,
            target_kl=config.extras.target_kl,
            ptx_coef=config.extras.ptx_coef,
        )

    def _hold_less(self, ref_policy: Any, dtype: torch.dtype) -> None:
        """Hold in `dtype` what is only multiplied in it, and once what policy, reference and reward have in common."""
        policy = self.learner.model.policy
        models.only_read(ref_policy, dtype, beside=policy)
        if models.writes_adapter_only(policy):
            models.only_read(policy, dtype)
        if isinstance(self.reward, SharesWeights):  # now: a reward that computes in fp32 keeps its own weights
            self.reward.share_weights(ref_policy)

    def anywhere(self, here: bool) -> bool:
        """Whether it holds on any process: all of them must leave the loop after the same step."""
        return bool(self.reduce(torch.tensor(float(here), device=self.accelerator.device)) > 0)

    def rollout(self, step: int, *, kl_coef: float, lap: Callable[[str], None] = lambda part: None) -> Rollout:
        """Completions of this step's prompts, ready for the update. Each process takes its share of the batch."""
        config, mine = self.config, self.rows
        samples = config.extras.rloo_samples or 1
        chosen = prompt_indices(len(self.prompts), step, config.batch_size // samples, seed=config.seed)
        rows = [index for index in chosen for _ in range(samples)]
        return collect(
            prompts=[self.prompts[rows[i]] for i in mine],
            prompt_ids=[self.prompt_ids[rows[i]] for i in mine],
            engine=self.engine,
            decode=lambda ids: text.decode_completion(self.tokenizer, ids),
            reward=self.reward,
            trunk_reward=self.trunk_reward,
            together=partial(processes.together, self.accelerator),
            max_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            pad_token_id=self.tokenizer.pad_token_id,
            generator=self._random_rows(step, mine.start),
            device=self.accelerator.device,
            trunk=self.trunk,
            lap=lap,
            **self._measuring(kl_coef),
        )

    def _measuring(self, kl_coef: float) -> dict[str, Any]:
        """How a rollout is measured, the first time and again."""
        config = self.config
        return {
            "model": self.learner.forward,
            "ref_model": self.ref_model,
            "shaping": Shaping(
                kl_coef=kl_coef,
                gamma=config.gamma,
                lam=config.lam,
                whiten_rewards=config.whiten_rewards,
                missing_eos_penalty=config.missing_eos_penalty,
                rloo_samples=config.extras.rloo_samples,
            ),
            "micro_batch_size": config.micro_batch_size,
            "micro_batch_tokens": config.micro_batch_tokens,
            "num_mini_batches": config.num_mini_batches,
            "halving": self.halving,
            "reduce": self.reduce,
        }

    def _random_rows(self, step: int, first: int) -> torch.Generator:
        """This step's random numbers from row `first` on: any number of processes samples the same batch."""
        generator = _generator(self.config.seed, "rollout", step)
        torch.rand(first, self.config.max_completion_tokens, generator=generator, dtype=torch.float64)
        return generator

    def update(self, step: int, batch: Rollout, *, kl_coef: float) -> dict[str, float]:
        """Optimise on the rollout; the first `value_warmup_steps` fit the value only."""
        config = self.config
        has_value = self.learner.model.value is not None
        return update(
            self.learner,
            batch,
            settings=self.settings,
            generator=_generator(config.seed, "update", step),
            train_policy=not has_value or step >= config.value_warmup_steps,
            ptx_batches=self.ptx_batches(step) if config.extras.ptx_coef else None,
            halving=self.halving,
            measure_again=partial(rollout.measured_again, **self._measuring(kl_coef)),
        )

    def metrics(self, batch: Rollout, *, kl_coef: float) -> dict[str, float]:
        """Of the rollout of all processes."""
        gather = cast(ops.Reduce, self.accelerator.gather)
        return rollout.metrics(batch, kl_coef=kl_coef, reduce=self.reduce, gather=gather)

    def ptx_batches(self, step: int) -> Iterator[Sequences]:
        """Endless random demonstrations, one micro-batch for each optimiser step."""
        generator = _generator(self.config.seed, "ptx", step, self.accelerator.process_index)
        while True:
            rows = torch.randint(len(self.demonstrations), (self.config.micro_batch_size,), generator=generator)
            prompts, completions = zip(*(self.demonstrations[i] for i in rows.tolist()), strict=True)
            batch = Sequences.from_lists(prompts, completions, pad=self.tokenizer.pad_token_id)
            yield batch.to(self.accelerator.device)


def prompt_indices(count: int, step: int, size: int, *, seed: int) -> list[int]:
    """Which of `count` prompts step number `step` uses: every prompt once an epoch, each epoch in another order.

    A function of the step alone: the data cursor of a checkpoint is its step.
    """
    wanted = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(count, generator=_generator(seed, "prompts", epoch)).tolist()
        for epoch in {position // count for position in wanted}
    }
    return [orders[position // count][position % count] for position in wanted]


# ---------------------------------------------------------------- the stage


def run(config: PPOConfig, *, load_reward: Callable[[str, Contract], RewardFn]) -> PPOResult:
    """The stage behind `rlhf ppo`. `load_reward` turns `config.reward` into a function and checks its text contract."""
    return train(config, **loaded(config, load_reward=load_reward))


class Inputs(TypedDict):
    """What `train` is given besides the config."""

    policy: Any
    tokenizer: Any
    reward: RewardFn
    prompts: Sequence[Prompt]
    value: ValueHead | ValueModel | None


def loaded(config: PPOConfig, *, load_reward: Callable[[str, Contract], RewardFn]) -> Inputs:
    """The inputs that a config names. Raises UserError for what is not given or cannot be loaded."""
    source = needed(config.model, "model", "the policy to start from")
    reward_source = needed(config.reward, "reward", "the reward to optimise")
    prompts_source = needed(config.prompts, "prompts", "the prompts to train on")
    prompts = data.distinct(data.read_prompts(prompts_source, config.columns))
    training, _ = data.split(prompts, config.held_out, key=lambda prompt: prompt)
    tokenizer = models.load_tokenizer(source)
    policy = models.load_policy(source, tokenizer, trainable=config.trainable)
    contract = models.model_contract(
        policy,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_completion_tokens=config.max_completion_tokens,
    )
    reward = load_reward(reward_source, contract)
    has_critic = config.value == "separate" and config.extras.rloo_samples is None
    value = _separate_critic(config, policy, tokenizer) if has_critic else None
    return {"policy": policy, "tokenizer": tokenizer, "reward": reward, "prompts": training, "value": value}


def _separate_critic(config: PPOConfig, policy: Any, tokenizer: Any) -> ValueModel:
    """A critic from the reward model where that reads the same tokens, else from the policy."""
    folder = Path(config.reward or "")
    theirs, mine = load_contract(folder), load_contract(models.local_source(config.model or ""))
    if theirs and mine and theirs.shares_text_with(mine) and models.is_classifier(folder):
        return ValueModel.from_classifier(models.load_classifier(str(folder), tokenizer, trainable=config.trainable))
    twin = models.trainable_copy(policy)
    backbone = (twin.get_base_model() if hasattr(twin, "peft_config") else twin).base_model
    return ValueModel(backbone, ValueHead(policy.get_output_embeddings().weight.shape[1]))


def _check_usable(policy: Any, prompts: Sequence[Prompt]) -> None:
    """Refuse what would train nothing, or next to nothing, without a word."""
    if not prompts:
        raise DataError("there is no prompt to train on: give more prompts, or lower held_out")
    trained = models.trainable_parameters(policy)
    if not trained:
        raise ConfigError("no weight of the policy is trainable: load it with models.load_policy(..., trainable=...)")
    coarse = {weight.dtype for weight in trained.values()} & {torch.bfloat16, torch.float16}
    if coarse:
        raise ConfigError(
            f"the policy's weights are {coarse.pop()}, in which small steps are lost: load it with dtype=torch.float32 "
            "(bf16 is for computing: precision)"
        )


def _demonstrations(config: PPOConfig, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    if not config.extras.ptx_coef:
        return []
    shown = data.read_demonstrations(needed(config.extras.ptx_data, "extras.ptx_data", "the demonstrations to mix in"))
    training, _ = data.split(shown, config.held_out, key=lambda d: d.prompt)
    encode = text.encode_completion
    pairs = [
        (
            text.encode_prompt(tokenizer, d.prompt),
            encode(tokenizer, d.completion, max_tokens=config.max_completion_tokens),
        )
        for d in training
    ]
    fitting = [(prompt, completion) for prompt, completion in pairs if len(prompt) <= config.max_prompt_tokens]
    if not fitting:
        raise DataError(f"no demonstration of extras.ptx_data fits max_prompt_tokens = {config.max_prompt_tokens}")
    return fitting


def _kl_controller(config: PPOConfig, value: float) -> KLController:
    if config.kl_target is None:
        return FixedKL(value)
    return AdaptiveKL(value, target=config.kl_target, horizon=config.kl_horizon)


def _value_learning_rate(config: PPOConfig, value: object) -> float:
    if config.value_learning_rate is not None:
        return config.value_learning_rate
    return config.learning_rate * (10 if isinstance(value, ValueHead) else 1)


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(checkpoint.seed_of(*parts))


def _timings(seconds: dict[str, float], episodes: int) -> dict[str, float]:
    """Of each part of a step; the rollout is all but the update."""
    whole = sum(seconds.values())
    return {
        **{f"timing/{part}_seconds": spent for part, spent in seconds.items()},
        "timing/rollout_seconds": whole - seconds["update"],
        "timing/eps": episodes / whole,
    }


def _report_samples(tracker: Tracker, batch: Rollout, step: int, steps: int) -> None:
    """A table of samples about ten times a run."""
    if step != 1 and step != steps and step % max(steps // 10, 1):
        return
    kl = batch.kl.tolist()
    rows = [
        (prompt_text(batch.prompts[i]), batch.completions[i], float(batch.scores[i]), kl[i], bool(batch.finished[i]))
        for i in range(min(8, len(batch)))
    ]
    tracker.table("samples", ("prompt", "completion", "score", "kl", "finished"), rows, step=step)


def _raise_alarms(tracker: Tracker, metrics: dict[str, float], running: dict[str, Any], step: int) -> None:
    broken = alarms.not_finite(metrics)
    if broken:
        raise UserError(
            f"{', '.join(broken)} became NaN or infinite: the last checkpoint is sound; lower learning_rate, run again"
        )
    for alarm in alarms.alarms(metrics, running["start"]):
        if step - running["alarmed"].get(alarm.name, -ALARM_AGAIN_AFTER) >= ALARM_AGAIN_AFTER:
            running["alarmed"][alarm.name] = step
            tracker.alert(alarm.title, alarm.advice)


def _report_data(metrics: dict[str, float], start: dict[str, float]) -> ReportData:
    """The run in one sentence; the report draws the curves by itself."""
    before, after, kl = start["objective/scores"], metrics["objective/scores"], metrics["objective/kl"]
    return ReportData(
        title="Proximal policy optimisation",
        verdict=f"The score went from {before:.2f} to {after:.2f} at a KL of {kl:.2f} nats per sequence, "
        f"in {metrics['episode']:.0f} completions. What that is worth, the evaluation says.",
        facts=(
            Fact("Score of the last rollout", after, reference=before),
            Fact("KL to the SFT policy (nats per sequence)", kl, reference=0.0),
            Fact("Tokens per completion", metrics["gen/length_mean"], reference=start["gen/length_mean"]),
        ),
    )


def _finish(
    task: Task, config: PPOConfig, metrics: dict[str, float], start: dict[str, float], tracker: Tracker
) -> PPOResult:
    folder = Path(config.output) / "model"
    task.learner.use_average()
    policy = task.learner.trained_policy()
    task.learner.save_value(Path(config.output) / "value")
    if task.accelerator.is_main_process:
        models.save_model(policy, task.tokenizer, folder, contract=task.contract)
        write_report_data(Path(config.output), _report_data(metrics, start))
    tracker.summary({name: value for name, value in metrics.items() if not name.startswith("timing/")})
    task.accelerator.wait_for_everyone()
    return PPOResult(policy, folder, metrics)

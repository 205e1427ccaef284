"""One frozen dataclass per stage. Values are checked here; nothing is derived back into them.

A field that is None where a stage needs a value is filled by `rlhf run` from the stage before, and is an error that
names the flag when the stage runs alone. Importing this module never imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.types import ConfigError

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class LastLayers:
    """Train the top layers only; everything below, and the tied LM head, stays frozen."""

    last_layers: int
    """How many transformer layers, counted from the top, are trained."""

    def __post_init__(self) -> None:
        require(self.last_layers >= 1, "trainable.last_layers", self.last_layers, "at least 1")


@dataclass(frozen=True)
class Lora:
    """Train low-rank adapters on every linear layer."""

    lora_rank: int = 16
    lora_alpha: int = 32

    def __post_init__(self) -> None:
        require(self.lora_rank >= 1, "trainable.lora_rank", self.lora_rank, "at least 1")
        require(self.lora_alpha >= 1, "trainable.lora_alpha", self.lora_alpha, "at least 1")


Trainable = Literal["full", "lora", "head"] | LastLayers | Lora
"""`full`, `lora`, `head` (everything frozen but the head), or `last_layers: n`."""


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raise ConfigError naming the field, its value and what it may be, unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but it must be {allowed}")


def needed(value: str | None, flag: str, what: str) -> str:
    """The value of a field without which the stage cannot run; raises ConfigError naming the flag."""
    if not value:
        raise ConfigError(f"{what} is not given: pass --{flag} or set `{flag}:` in the YAML")
    return value


POSITIVE = (
    *("batch_size", "micro_batch_size", "micro_batch_tokens", "rollout_batch_size"),
    *("max_prompt_tokens", "max_completion_tokens"),
    *("learning_rate", "value_learning_rate", "temperature", "max_grad_norm", "epochs", "num_prompts"),
    *("save_every", "log_every", "kl_horizon"),
)
NOT_NEGATIVE = ("seed", "round", "weight_decay", "vf_coef")


def _check_common(config: Any) -> None:
    """Ranges that hold for every stage that has the field. A field that is None is filled later, or not used."""
    given = {name: value for name, value in vars(config).items() if value is not None}
    for name, value in given.items():
        if isinstance(value, float) and name != "max_grad_norm":  # there, infinite means: do not clip
            require(math.isfinite(value), name, value, "finite")
        if name in POSITIVE:
            require(value > 0, name, value, "above 0")
        if name in NOT_NEGATIVE:
            require(value >= 0, name, value, "0 or more")
        if name == "held_out":
            require(0 <= value < 1, name, value, "a fraction: 0 or more, below 1")
        if name == "warmup_share":
            require(0 <= value <= 1, name, value, "a fraction: 0 to 1")


@dataclass(frozen=True)
class Tracking:
    """Where the numbers go besides `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when an API key is found, else offline."""
    project: str = "rlhf"
    group: str | None = None
    """Runs of one pipeline share a group; `rlhf run` sets it to the run's name."""
    name: str | None = None


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations."""

    data: str | None = None
    """Demonstrations: a file, folder, hub id, or `module:function`."""
    model: str = "embedded:smollm2-135m"
    """Hub id, local folder, GGUF file, or `embedded:smollm2-135m`."""
    output: str = "runs/default/sft"
    columns: dict[str, str] = field(default_factory=dict)
    """Your column names, as `{prompt: question, completion: answer}`."""
    held_out: float = 0.1
    """Share of prompts (chosen by hash) kept out of training in every stage."""
    trainable: Trainable = "full"
    epochs: float = 1.0
    batch_size: int = 32
    micro_batch_size: int = 8
    learning_rate: float = 2e-5
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_prompt_tokens: int = 256
    max_completion_tokens: int = 256
    log_every: int = 5
    save_every: int = 50
    precision: Precision = "auto"
    seed: int = 0
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True)
class SampleConfig:
    """K completions per prompt, into the label store."""

    model: str | None = None
    """The policy to sample from."""
    prompts: str | None = None
    store: str = "runs/default/labels.db"
    """SQLite file, or an SQLAlchemy URL."""
    output: str = "runs/default/sample"
    columns: dict[str, str] = field(default_factory=dict)
    split: Literal["train", "held_out", "all"] = "all"
    """Which side of the split to sample; rankings of held-out prompts measure the reward model."""
    held_out: float = 0.1
    num_prompts: int | None = None
    """At most this many prompts, drawn with the seed; None takes all."""
    completions_per_prompt: int = 4
    temperature: float = 1.0
    max_prompt_tokens: int = 256
    max_completion_tokens: int = 256
    batch_size: int = 64
    """Sequences decoded together."""
    round: int = 0
    precision: Precision = "auto"
    seed: int = 0
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _check_common(self)
        require(2 <= self.completions_per_prompt <= 9, "completions_per_prompt", self.completions_per_prompt, "2 to 9")


@dataclass(frozen=True)
class Simulation:
    """Annotators with a known utility, in the place of people. They use the same service calls as the page.

    The unit is one standard deviation of the utility among the completions of a prompt.
    """

    utility: str = ""
    """`module:function` taking (prompt, completion) and returning a float."""
    annotators: int = 5
    temperature: float = 0.65
    """Noise of one judgement; 0.65 gives the pairwise agreement of people, 0.70 to 0.85."""
    temperature_spread: float = 0.2
    """How much annotators differ in noise: standard deviation of the logarithm of their temperature."""
    position_bias: float = 0.1
    """Utility that the first place on the page is worth over the last."""
    tie_threshold: float = 0.15
    """Completions closer than this, after noise, are tied."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(":" in self.utility, "simulate.utility", self.utility, "written as module:function")
        require(self.annotators >= 1, "simulate.annotators", self.annotators, "at least 1")
        require(self.temperature >= 0, "simulate.temperature", self.temperature, "0 or more")
        require(self.temperature_spread >= 0, "simulate.temperature_spread", self.temperature_spread, "0 or more")
        require(self.tie_threshold >= 0, "simulate.tie_threshold", self.tie_threshold, "0 or more")
        require(self.seed >= 0, "simulate.seed", self.seed, "0 or more")


@dataclass(frozen=True)
class LabelConfig:
    """The page on which people rank, or the simulated annotators in their place."""

    store: str = "runs/default/labels.db"
    output: str = "runs/default/label"
    host: str = "127.0.0.1"
    """Only this machine: `127.0.0.1`, `localhost` or `::1`."""
    port: int = 7860
    annotator: str = "me"
    """Name under which the rankings of this page are stored."""
    overlap: int = 1
    """How many annotators rank each item."""
    overlap_share: float = 0.2
    """Share of items, drawn with the seed, that get one annotator more, so that agreement can be measured."""
    guidelines: str | None = None
    """A Markdown file shown beside the cards."""
    guideline_version: int = 1
    round: int = 0
    """Which round's items are ranked."""
    accounts: bool = False
    """Annotators log in with their own names (`rlhf accounts`); needed to be reached from other machines."""
    public_url: str | None = None
    """With `accounts`: the address in the annotators' browsers behind a proxy, such as https://label.example.org/rank."""
    insecure_http: bool = False
    """With `accounts`: let a public_url be http://, so that passwords cross the network unencrypted."""
    criteria: list[str] = field(default_factory=list)
    """What else each completion is rated for, from 1 to 5, such as `helpful`; optional for annotators."""
    quiz: str | None = None
    """A YAML file of questions that an annotator answers before the first item."""
    gold: str | None = None
    """A rankings JSONL whose answers are known; its items are mixed in, unmarked, at `gold_rate`."""
    gold_rate: float = 0.0
    """Share of an annotator's items that are gold."""
    repeat_rate: float = 0.0
    """Share of an annotator's items that they have ranked before, shown in another order, unmarked."""
    words_per_second: float = 12.0
    """Who ranks an item faster than its words could be read at this speed is marked as too fast, never refused."""
    lease_minutes: float = 30.0
    """How long an item that was handed out and not ranked holds its place."""
    edit_minutes: float = 60.0
    """How long a submitted ranking can be changed."""
    simulate: Simulation | None = None
    """Given: simulated annotators rank, and no page opens."""
    seed: int = 0
    """Decides who sees which item when, and in which order its completions are shown."""
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _check_common(self)
        require(1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        require(self.overlap >= 1, "overlap", self.overlap, "at least 1")
        require(0 <= self.overlap_share <= 1, "overlap_share", self.overlap_share, "between 0 and 1")
        require(bool(self.annotator.strip()), "annotator", self.annotator, "a name")
        for name in ("gold_rate", "repeat_rate"):
            require(0 <= getattr(self, name) <= 0.5, name, getattr(self, name), "between 0 and 0.5")
        for name in ("words_per_second", "lease_minutes", "edit_minutes"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(
            self.gold_rate + self.repeat_rate <= 0.5, "repeat_rate", self.repeat_rate, "0.5 with gold_rate, at most"
        )
        require(self.gold is not None or self.gold_rate == 0, "gold_rate", self.gold_rate, "0 without `gold`")
        if self.simulate:
            require(self.overlap <= self.simulate.annotators, "overlap", self.overlap, "at most simulate.annotators")


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from rankings."""

    model: str | None = None
    """The SFT checkpoint to start from."""
    rankings: str | None = None
    """A label store, a rankings JSONL, preference pairs, or soft labels."""
    soft_labels: bool = False
    """In `rlhf run`: learn from what all annotators say together, weighed by how reliable each is (the label stage's
    soft_labels.jsonl), rather than from every ranking."""
    annotators: list[str] | None = None
    """Use the rankings of these annotators only."""
    output: str = "runs/default/reward"
    columns: dict[str, str] = field(default_factory=dict)
    held_out: float = 0.1
    trainable: Trainable = "full"
    loss: Literal["plackett_luce", "bradley_terry"] = "plackett_luce"
    """Both read ties; Bradley-Terry takes all pairs of a ranking at once."""
    center_coef: float = 0.01
    """Weight of the squared double mean of a ranking's scores (Eisenstein et al. 2023), which keeps them near 0."""
    label_smoothing: float = 0.0
    """Share of judgements taken to be reversed; 0.05 to 0.1 where annotators are known to be careless."""
    epochs: float = 1.0
    batch_size: int = 16
    """Rankings per optimiser step."""
    micro_batch_size: int = 4
    """Rankings forwarded together; each is K sequences."""
    learning_rate: float = 2e-5
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_prompt_tokens: int = 256
    max_completion_tokens: int = 256
    save_every: int = 50
    precision: Precision = "auto"
    seed: int = 0
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _check_common(self)
        require(self.center_coef >= 0, "center_coef", self.center_coef, "0 or more")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "0 or more, below 0.5")


@dataclass(frozen=True)
class PPOExtras:
    """Refinements that are off by default."""

    dual_clip: float | None = None
    """Bound of the loss where the advantage is negative and the ratio large (3 is usual)."""
    target_kl: float | None = None
    """Leave the update's remaining epochs when approxkl of an epoch exceeds this."""
    ptx_coef: float = 0.0
    """Weight of the SFT loss mixed into every optimiser step."""
    ptx_data: str | None = None
    """Demonstrations for the mix."""
    ema_decay: float | None = None
    """Save the exponential moving average of the policy (0.992 in InstructGPT) as the result."""
    rloo_samples: int | None = None
    """Completions per prompt; the mean score of the others is the baseline, and there is no value model."""

    def __post_init__(self) -> None:
        require(self.dual_clip is None or self.dual_clip > 1, "extras.dual_clip", self.dual_clip, "above 1")
        require(self.target_kl is None or self.target_kl > 0, "extras.target_kl", self.target_kl, "above 0")
        require(self.ptx_coef >= 0, "extras.ptx_coef", self.ptx_coef, "0 or more")
        require(
            self.ptx_coef == 0 or self.ptx_data is not None, "extras.ptx_data", self.ptx_data, "given with ptx_coef"
        )
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "extras.ema_decay", self.ema_decay, "between 0 and 1")
        require(
            self.rloo_samples is None or self.rloo_samples >= 2, "extras.rloo_samples", self.rloo_samples, "at least 2"
        )


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation against a reward, held near the SFT policy by a KL penalty."""

    model: str | None = None
    """The SFT policy: start and reference."""
    reward: str | None = None
    """A reward model's folder, or `module:function` of any Python callable."""
    prompts: str | None = None
    output: str = "runs/default/ppo"
    columns: dict[str, str] = field(default_factory=dict)
    held_out: float = 0.1
    trainable: Trainable = "full"
    value: Literal["head", "separate"] = "head"
    """head: a value head on the policy's trunk; separate: a critic of its own, from the reward model where it fits."""
    total_episodes: int = 4096
    batch_size: int = 128
    """Completions per rollout."""
    num_mini_batches: int = 4
    micro_batch_size: int = 16
    """Sequences forwarded together. Halved, with a line that says so, where memory does not suffice."""
    micro_batch_tokens: int | None = None
    """Given: micro-batches hold as many sequences of like length as have at most so many tokens, padding included, in
    place of `micro_batch_size`. A sequence that is longer by itself stands alone."""
    num_ppo_epochs: int = 2
    learning_rate: float = 1e-5
    schedule: Literal["linear", "constant"] = "linear"
    value_learning_rate: float | None = None
    """Of the value head or model; None: ten times `learning_rate` for a head, the same for a separate critic."""
    value_warmup_steps: int = 2
    """First rollouts that train the value only, with the policy held still."""
    kl_coef: float = 0.05
    kl_target: float | None = None
    """Given: kl_coef adapts until the KL per sequence (nats) is here."""
    kl_horizon: int = 10_000
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    temperature: float = 1.0
    max_prompt_tokens: int = 256
    max_completion_tokens: int = 256
    missing_eos_penalty: float = 1.0
    """Taken from the score of a completion that did not end by itself."""
    max_grad_norm: float = 1.0
    rollout_batch_size: int = 64
    """Sequences decoded together."""
    save_every: int = 10
    precision: Precision = "auto"
    seed: int = 0
    extras: PPOExtras = field(default_factory=PPOExtras)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _check_common(self)
        require(self.batch_size <= self.total_episodes, "batch_size", self.batch_size, "at most total_episodes")
        most, told = self.batch_size, f"batch_size = {self.batch_size}"
        if self.micro_batch_tokens is None:
            most //= self.micro_batch_size
            told = f"batch_size / micro_batch_size = {self.batch_size} / {self.micro_batch_size}"
        require(1 <= self.num_mini_batches <= most, "num_mini_batches", self.num_mini_batches, f"1 to {told}")
        require(self.num_ppo_epochs >= 1, "num_ppo_epochs", self.num_ppo_epochs, "at least 1")
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, "0 or more")
        require(self.kl_target is None or self.kl_target > 0, "kl_target", self.kl_target, "above 0")
        require(self.cliprange > 0, "cliprange", self.cliprange, "above 0")
        require(
            self.cliprange_value is None or self.cliprange_value > 0,
            "cliprange_value",
            self.cliprange_value,
            "above 0, or null for no clipping",
        )
        require(0 <= self.lam <= 1, "lam", self.lam, "between 0 and 1")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "above 0, at most 1")
        require(self.value_warmup_steps >= 0, "value_warmup_steps", self.value_warmup_steps, "0 or more")
        samples = self.extras.rloo_samples
        require(
            samples is None or self.batch_size % samples == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of extras.rloo_samples = {samples}",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Two policies on the same held-out prompts."""

    policy: str | None = None
    baseline: str | None = None
    """The policy to beat, and the reference of the KL: usually SFT."""
    reward: str | None = None
    """Scores both: the trained reward model, or `module:function`."""
    judge: str | None = None
    """`module:function` of (prompts, completions) that decides the wins instead of the reward: a truth it never saw."""
    prompts: str | None = None
    output: str = "runs/default/evaluate"
    columns: dict[str, str] = field(default_factory=dict)
    split: Literal["train", "held_out", "all"] = "held_out"
    held_out: float = 0.1
    num_prompts: int = 256
    samples_per_prompt: int = 2
    best_of_n: int = 4
    """Baseline samples of which the reward picks one; 16 for the long version."""
    temperature: float = 1.0
    max_prompt_tokens: int = 256
    max_completion_tokens: int = 256
    batch_size: int = 64
    bootstrap: int = 2000
    precision: Precision = "auto"
    seed: int = 0
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        _check_common(self)
        require(self.num_prompts >= 2, "num_prompts", self.num_prompts, "at least 2")
        require(self.samples_per_prompt >= 1, "samples_per_prompt", self.samples_per_prompt, "at least 1")
        require(self.best_of_n >= 1, "best_of_n", self.best_of_n, "at least 1")
        require(self.bootstrap >= 100, "bootstrap", self.bootstrap, "at least 100")


@dataclass(frozen=True)
class CheckConfig:
    """Whether the invariants of PPO hold on your own model, tokenizer, chat template and reward."""

    model: str | None = None
    """Hub id, local folder, GGUF file, or `embedded:smollm2-135m`."""
    reward: str | None = None
    """A reward model's folder, or `module:function`; left out, only the model is checked."""
    prompts: str | None = None
    """Some of these are used; left out, built-in ones are."""
    columns: dict[str, str] = field(default_factory=dict)
    trainable: Trainable | None = None
    """Left out, all four techniques are checked, `last_layers` with the upper half of the layers."""
    temperature: float = 1.0
    max_prompt_tokens: int = 64
    """Longer prompts are left out: they would only take longer."""
    precision: Precision = "auto"
    """That PPO is to compute in: old and new logprobs and the sampler are compared in it, all else in fp32."""
    json: bool = False
    """Print one JSON object instead of the table; `--json` alone means true."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True)
class ChatConfig:
    """Two policies side by side in a page: one prompt, the same random numbers, the reward beside each answer."""

    run: str | None = None
    """A run's folder: its PPO and SFT policies, reward model and prompts are taken where you name no others."""
    policy: str | None = None
    """The policy to look at; a run's PPO policy, or its SFT policy alone while there is no other."""
    baseline: str | None = None
    """The policy beside it, and the reference of the KL: a run's SFT policy."""
    reward: str | None = None
    """Scores the answers: a reward model's folder, or `module:function`."""
    prompts: str | None = None
    """Examples to draw from: held-out prompts of the run where left out."""
    columns: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    """Folder of `chat.jsonl`, which keeps every exchange: the run's. Without either, nothing is kept."""
    host: str = "127.0.0.1"
    """Only this machine: `127.0.0.1`, `localhost` or `::1`."""
    port: int = 7861
    """0 takes a free one."""
    temperature: float = 1.0
    max_completion_tokens: int | None = None
    """What the page starts with: the limit that the policy was trained with where left out."""
    precision: Precision = "auto"
    seed: int = 0
    """The page starts with it; also draws the examples."""

    def __post_init__(self) -> None:
        _check_common(self)
        require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")


STAGES = ("sft", "sample", "label", "reward", "ppo", "evaluate")
"""The stages of a pipeline, in order."""


@dataclass(frozen=True)
class RunConfig:
    """The pipeline. Models, stores and outputs that a stage leaves out come from the stages before it."""

    name: str = "default"
    runs: str = "runs"
    """Results go to `<runs>/<name>/<stage>`."""
    seed: int | None = None
    """Of every stage that does not set its own."""
    tracking: Tracking = field(default_factory=Tracking)
    """Of every stage that does not set its own."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")
        parts = self.name.split("/")
        require(
            all(part.strip() and part not in (".", "..") for part in parts),
            "name",
            self.name,
            "the name of a folder in `runs`",
        )

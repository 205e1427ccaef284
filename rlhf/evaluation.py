"""Two policies on the same held-out prompts: who wins, by how much, how far from the start, against best-of-n."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf import comparison, models, ops, statistics, text
from rlhf.actor_critic import ActorCritic
from rlhf.checkpoint import seed_of
from rlhf.config import EvaluateConfig, needed
from rlhf.contract import Contract
from rlhf.generation import Generated
from rlhf.progress import Bar, progress, say
from rlhf.report_data import write_report_data
from rlhf.rollout import measure, partition
from rlhf.run_folder import finite, write_json
from rlhf.sample import choose_prompts, sampler
from rlhf.scoring import checked_scores
from rlhf.sequences import Sequences
from rlhf.sources import resolve
from rlhf.statistics import Estimate
from rlhf.tracking import Tracker
from rlhf.types import ContractError, Prompt, RewardFn, prompt_text


@dataclass(frozen=True)
class PolicyNumbers:
    """One policy's samples in numbers; means with 95 % intervals from a bootstrap over prompts."""

    score: Estimate
    """By the reward."""
    judged: Estimate
    """By the judge; the same as `score` where there is none."""
    length: Estimate
    """Tokens, EOS included."""
    eos_rate: float
    distinct2: float
    """NaN where no completion has two words."""


@dataclass(frozen=True)
class BestOfN:
    """The baseline's best of n by the reward: what can be had without training, at this KL (nats, an upper bound)."""

    n: int
    kl: float
    score: float
    judged: float


@dataclass(frozen=True)
class Evaluation:
    """The comparison. `win_rate` is of the policy over the baseline by the judge, ties as half."""

    prompts: int
    samples_per_prompt: int
    policy: PolicyNumbers
    baseline: PolicyNumbers
    win_rate: Estimate
    kl: Estimate
    """KL(policy || baseline) in nats per sequence, k1 estimate on the policy's samples."""
    best_of_n: tuple[BestOfN, ...]


@dataclass(frozen=True)
class Samples:
    """All samples of one policy: `of_prompt[i]` numbers the prompt that sample i continues."""

    of_prompt: np.ndarray
    generated: list[Generated]
    completions: list[str]
    scores: np.ndarray
    judged: np.ndarray

    def first(self, per_prompt: int) -> Samples:
        """The first samples of every prompt."""
        total = len(self.of_prompt) // (int(self.of_prompt[-1]) + 1)
        keep = [i for i in range(len(self.of_prompt)) if i % total < per_prompt]
        return Samples(
            self.of_prompt[keep],
            [self.generated[i] for i in keep],
            [self.completions[i] for i in keep],
            self.scores[keep],
            self.judged[keep],
        )


def run(config: EvaluateConfig, *, load_reward: Callable[[str, Contract], RewardFn]) -> Evaluation:
    """The stage behind `rlhf evaluate`."""
    policy_source = needed(config.policy, "policy", "the policy to evaluate")
    baseline_source = needed(config.baseline, "baseline", "the policy to compare with")
    prompts = choose_prompts(
        needed(config.prompts, "prompts", "the prompts to evaluate on"),
        config.columns,
        split=config.split,
        held_out=config.held_out,
        count=config.num_prompts,
        seed=config.seed,
    )
    reward_source = needed(config.reward or config.judge, "reward", "the reward that scores both policies")
    tokenizer = models.load_tokenizer(policy_source)
    if models.load_tokenizer(baseline_source).get_vocab() != tokenizer.get_vocab():
        raise ContractError(
            f"{policy_source} and {baseline_source} have different tokenizers, so no KL can be taken between them: "
            f"give a --baseline that the policy was trained from"
        )
    policy, baseline = (models.load_policy(source, tokenizer) for source in (policy_source, baseline_source))
    ids, _ = text.encode_prompts(tokenizer, prompts, max_tokens=config.max_prompt_tokens)
    models.check_context(policy, max(map(len, ids)) + config.max_completion_tokens, "a prompt with its completion")
    limits = {"max_prompt_tokens": config.max_prompt_tokens, "max_completion_tokens": config.max_completion_tokens}
    reward = load_reward(reward_source, models.model_contract(policy, tokenizer, **limits))
    judge = resolve(config.judge) if config.judge else reward
    return evaluate(
        config, policy=policy, baseline=baseline, tokenizer=tokenizer, reward=reward, judge=judge, prompts=prompts
    )


def evaluate(
    config: EvaluateConfig,
    *,
    policy: Any,
    baseline: Any,
    tokenizer: Any,
    reward: RewardFn,
    judge: RewardFn,
    prompts: Sequence[Prompt],
) -> Evaluation:
    """Sample both policies (which share `tokenizer`) on the prompts, compare them, and write `config.output`."""
    ids, kept = text.encode_prompts(tokenizer, prompts, max_tokens=config.max_prompt_tokens)
    prompts = [prompts[i] for i in kept]
    per_prompt, drawn = config.samples_per_prompt, max(config.samples_per_prompt, config.best_of_n)
    folder = Path(config.output)
    with (
        Tracker(folder, stage="evaluate", config=config, tracking=config.tracking) as tracker,
        progress("evaluate", total=len(prompts) * (per_prompt + drawn)) as bar,
    ):
        draw = _Drawer(config, tokenizer, reward, judge, prompts, ids, bar)
        ours = draw(policy, per_prompt)
        pool = draw(baseline, drawn)
        theirs = pool.first(per_prompt)
        kl = _kl(config, policy, baseline, tokenizer, ids, ours)
        result = Evaluation(
            prompts=len(prompts),
            samples_per_prompt=per_prompt,
            policy=_numbers(config, ours),
            baseline=_numbers(config, theirs),
            win_rate=statistics.win_rate(
                statistics.outcomes(ours.judged, theirs.judged),
                ours.of_prompt,
                seed=config.seed,
                resamples=config.bootstrap,
            ),
            kl=statistics.bootstrap_mean(kl, ours.of_prompt, seed=config.seed, resamples=config.bootstrap),
            best_of_n=tuple(_best_of_n(pool, n) for n in _powers_of_two(drawn)),
        )
        tracker.table("samples", SAMPLE_COLUMNS, _side_by_side(prompts, ours, theirs), step=0)
        tracker.log(_flat(result), step=0)
        tracker.summary(_flat(result))
        record = _without_nan(asdict(result))
        write_json(folder / comparison.FILE, record)
        write_report_data(folder, comparison.report_data(record))
    say(
        f"evaluate: win rate over the baseline {result.win_rate} on {len(prompts)} prompts x {per_prompt} samples, "
        f"KL {result.kl}"
    )
    return result


SAMPLE_COLUMNS = (
    *("prompt", "baseline", "policy", "winner"),
    *("baseline score", "policy score", "baseline judged", "policy judged", "judged gain"),
)


BATCHES = 8
"""That an engine is given at once: where a row ends another begins, but for the last ones."""


class _Drawer:
    """Draws and scores `count` completions of every prompt from one policy.

    Row i of every policy is drawn with the same random numbers: with as many samples of each, the two answers to a
    prompt are coupled, and a policy draws with itself. With more samples of one, they are as good as independent.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        tokenizer: Any,
        reward: RewardFn,
        judge: RewardFn,
        prompts: Sequence[Prompt],
        ids: Sequence[list[int]],
        bar: Bar,
    ):
        self.config, self.tokenizer, self.reward, self.judge = config, tokenizer, reward, judge
        self.prompts, self.ids, self.bar = prompts, ids, bar

    def __call__(self, policy: Any, count: int) -> Samples:
        config = self.config
        engine = sampler(policy, self.tokenizer, precision=config.precision, batch_size=config.batch_size)
        of_prompt = [i for i in range(len(self.prompts)) for _ in range(count)]
        generated: list[Generated] = []
        size = BATCHES * config.batch_size
        for start in range(0, len(of_prompt), size):
            chunk = of_prompt[start : start + size]
            seed = seed_of(config.seed, "evaluate", start)
            generated += engine.generate(
                [self.ids[i] for i in chunk],
                max_tokens=config.max_completion_tokens,
                temperature=config.temperature,
                generator=torch.Generator().manual_seed(seed),
                on_progress=self.bar.advance,
            )
        completions = [text.decode_completion(self.tokenizer, g.ids) for g in generated]
        asked = [self.prompts[i] for i in of_prompt]
        scores = np.array(checked_scores(self.reward, asked, completions))
        judged = scores if self.judge is self.reward else np.array(checked_scores(self.judge, asked, completions))
        return Samples(np.array(of_prompt), generated, completions, scores, judged)


def _kl(
    config: EvaluateConfig, policy: Any, baseline: Any, tokenizer: Any, ids: Sequence[list[int]], samples: Samples
) -> np.ndarray:
    """k1 of every sample of the policy, in nats."""
    where = models.device()
    dtype = models.compute_dtype(config.precision, where)
    sequences = Sequences.from_lists(
        [ids[i] for i in samples.of_prompt], [g.ids for g in samples.generated], pad=tokenizer.pad_token_id
    ).to(where)
    micro_batches = partition(sequences, max(1, config.batch_size // 4))
    logprobs, ref_logprobs = (
        measure(ActorCritic(each, None, temperature=config.temperature, dtype=dtype), sequences, micro_batches).logprobs
        for each in (policy.to(where), baseline.to(where))
    )
    return ops.kl_k1(logprobs, ref_logprobs).sum(1).double().cpu().numpy()


def _numbers(config: EvaluateConfig, samples: Samples) -> PolicyNumbers:
    def mean(values: Any) -> Estimate:
        return statistics.bootstrap_mean(values, samples.of_prompt, seed=config.seed, resamples=config.bootstrap)

    return PolicyNumbers(
        score=mean(samples.scores),
        judged=mean(samples.judged),
        length=mean([len(g.ids) for g in samples.generated]),
        eos_rate=float(np.mean([g.finished for g in samples.generated])),
        distinct2=statistics.distinct_n(samples.completions, 2),
    )


def _best_of_n(pool: Samples, n: int) -> BestOfN:
    """Mean over prompts of the expected best of n of the pool, by the reward."""
    groups = [np.flatnonzero(pool.of_prompt == prompt) for prompt in np.unique(pool.of_prompt)]

    def expected(values: np.ndarray) -> float:
        return float(np.mean([statistics.best_of_n_expectation(pool.scores[g], values[g], n) for g in groups]))

    return BestOfN(n, statistics.best_of_n_kl(n), expected(pool.scores), expected(pool.judged))


def _powers_of_two(limit: int) -> list[int]:
    return [2**i for i in range(1, limit.bit_length()) if 2**i <= limit]


def _side_by_side(prompts: Sequence[Prompt], ours: Samples, theirs: Samples) -> list[tuple[Any, ...]]:
    return [
        (
            prompt_text(prompts[ours.of_prompt[i]]),
            theirs.completions[i],
            ours.completions[i],
            _winner(ours.judged[i] - theirs.judged[i]),
            float(theirs.scores[i]),
            float(ours.scores[i]),
            float(theirs.judged[i]),
            float(ours.judged[i]),
            float(ours.judged[i] - theirs.judged[i]),
        )
        for i in range(len(ours.completions))
    ]


def _winner(gain: float) -> str:
    return "policy" if gain > 0 else "baseline" if gain < 0 else "tie"


def _without_nan(value: Any) -> Any:
    """Nested plain values with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else finite(value)


def _flat(result: Evaluation) -> dict[str, float]:
    """The numbers as a dashboard shows them."""
    flat = {
        "eval/win_rate": result.win_rate.value,
        "eval/win_rate_low": result.win_rate.low,
        "eval/win_rate_high": result.win_rate.high,
        "eval/kl": result.kl.value,
    }
    for name, numbers in (("policy", result.policy), ("baseline", result.baseline)):
        flat |= {
            f"eval/{name}/score": numbers.score.value,
            f"eval/{name}/judged": numbers.judged.value,
            f"eval/{name}/length": numbers.length.value,
            f"eval/{name}/eos_rate": numbers.eos_rate,
            f"eval/{name}/distinct2": numbers.distinct2,
        }
    for best in result.best_of_n:
        flat |= {f"eval/best_of_{best.n}/score": best.score, f"eval/best_of_{best.n}/judged": best.judged}
    return flat

"""The stage behind `rlhf reward`: reads rankings and model, trains, and says how good the result is."""

from __future__ import annotations

from pathlib import Path

from reward_models.evaluation import Evaluation
from reward_models.preferences import load_rankings, load_soft_labels
from reward_models.train import SAMPLE_COLUMNS, RewardResult, train
from rlhf import models
from rlhf.config import RewardConfig, needed
from rlhf.progress import say
from rlhf.report_data import Curve, Fact, ReportData, Samples, Table, write_report_data
from rlhf.soft_labels import consensus
from rlhf.statistics import Estimate
from rlhf.types import ConfigError

CURVES = (
    Curve("Loss per ranking", ("train/loss", "eval/loss")),
    Curve("Pair accuracy", ("train/accuracy", "eval/accuracy"), note="Training batches: before their step."),
    Curve("Margin of the preferred completion (raw score)", ("margin",)),
    Curve("Calibration error", ("eval/ece",)),
    Curve("Gradient norm", ("grad_norm",)),
    Curve("Learning rate", ("lr",)),
)


def run(config: RewardConfig) -> RewardResult:
    """Train a reward model as the configuration says, and write `config.output`. Raises UserError."""
    source = needed(config.model, "model", "the SFT checkpoint to start from")
    rankings_source = needed(config.rankings, "rankings", "the rankings to learn from")
    if config.soft_labels and "://" not in rankings_source and not Path(rankings_source).exists():
        raise ConfigError(
            f"soft_labels is set, but there is no {rankings_source}: `rlhf label` writes it once two annotators have "
            f"ranked the same item (--overlap 2); leave soft_labels out to learn from every ranking as it is"
        )
    soft = load_soft_labels(rankings_source)
    _check_softness(config, bool(soft))
    if soft:
        rankings, left_out = consensus(soft), {}
    else:
        rankings, left_out = load_rankings(rankings_source, columns=config.columns, annotators=config.annotators)
    for reason in left_out:
        say(f"reward: left out {reason}")
    tokenizer = models.load_tokenizer(source)
    classifier = models.load_classifier(source, tokenizer, trainable=config.trainable, seed=config.seed)
    result = train(config, classifier=classifier, tokenizer=tokenizer, rankings=rankings, soft=soft)
    write_report_data(Path(config.output), report_data(result))
    say(f"reward: {verdict(result.evaluation)}")
    say(f"reward: model in {result.model_folder}")
    return result


def _check_softness(config: RewardConfig, soft: bool) -> None:
    if soft and config.annotators is not None:
        raise ConfigError(f"{config.rankings} holds what all annotators say together: leave `annotators` out")
    if config.soft_labels and not soft:
        raise ConfigError(
            f"soft_labels is set, but {config.rankings} holds none: give the soft_labels.jsonl that `rlhf label` writes"
        )


def verdict(evaluation: Evaluation | None) -> str:
    """One sentence on how good the reward model is, uncertainty included."""
    if evaluation is None:
        return "held-out accuracy unknown, because no held-out ranking prefers one completion to another."
    of_whom = (
        f"held-out pair accuracy {evaluation.accuracy} on {evaluation.pairs} pairs of {evaluation.prompts} prompts"
    )
    baseline = f"length alone reaches {evaluation.length_baseline:.3f}"
    if evaluation.ceiling is None:
        return f"{of_whom}; {baseline}; no two annotators ranked the same pair, so the human ceiling is unknown."
    return (
        f"{of_whom}; {baseline}; a perfect model would reach {evaluation.ceiling:.3f}, as annotators agree with each "
        f"other on {evaluation.agreement:.3f} of {evaluation.agreement_pairs} pairs."
    )


def report_data(result: RewardResult) -> ReportData:
    """The stage's part of the report."""
    evaluation = result.evaluation
    return ReportData(
        title="Reward model",
        verdict=verdict(evaluation).capitalize(),
        facts=(*(_facts(evaluation) if evaluation else ()), *_plain_facts(result)),
        curves=CURVES,
        tables=(_by_annotator(evaluation),) if evaluation else (),
        samples=Samples(SAMPLE_COLUMNS, tuple(result.samples)),
    )


def _facts(evaluation: Evaluation) -> tuple[Fact, ...]:
    def fact(name: str, estimate: Estimate, note: str = "") -> Fact:
        return Fact(name, estimate.value, estimate.low, estimate.high, note, reference=0.5)

    ceiling = "no pair was judged by two annotators" if evaluation.ceiling is None else "from their agreement"
    return (
        fact("Held-out pair accuracy", evaluation.accuracy, f"{evaluation.pairs} pairs, ties left out"),
        fact("The same, ties as half", evaluation.accuracy_ties_half, f"{evaluation.ties} ties"),
        fact("Baseline: the longer completion wins", evaluation.longer_wins),
        Fact("Accuracy of a perfect model on these annotators", evaluation.ceiling, note=ceiling),
        Fact("Kendall tau per ranking", evaluation.kendall_tau, reference=0.0),
        Fact("Best completion found", evaluation.top1),
        Fact("Expected calibration error", evaluation.ece),
    )


def _plain_facts(result: RewardResult) -> tuple[Fact, ...]:
    return (
        Fact("Rankings trained on", result.trained_on),
        Fact("Raw score, mean", result.score_mean, note="subtracted from every score"),
        Fact("Raw score, standard deviation", result.score_std, note="every score is divided by it"),
    )


def _by_annotator(evaluation: Evaluation) -> Table:
    rows = tuple((name, each.value, each.low, each.high) for name, each in evaluation.by_annotator.items())
    return Table("Accuracy by annotator", ("annotator", "accuracy", "low", "high"), rows)

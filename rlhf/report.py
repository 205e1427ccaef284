"""One self-contained HTML page of a stage or of a whole run, from the files that the stages left.

A stage that wants more than its curves writes `report.json` (`write_report_data`); one that does not gets a page too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import report_page as page
from rlhf.comparison import TITLES as AGAINST_KL
from rlhf.config import STAGES
from rlhf.environment import without_passwords
from rlhf.figures import chart, text
from rlhf.progress import duration
from rlhf.report_data import (
    Curve,
    Fact,
    Line,
    Plot,
    ReportData,
    Samples,
    Table,
    read_report_data,
    write_report_data,
)
from rlhf.run_folder import (
    ALERTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    REPORT,
    REPORT_DATA,
    SAMPLES,
    SUMMARY,
    read_json,
    read_records,
    write_atomically,
)
from rlhf.types import DataError

__all__ = ["Curve", "Fact", "Line", "Plot", "ReportData", "Samples", "Table", "render", "write_report_data"]

TITLES = {
    "sft": "Supervised fine-tuning",
    "sample": "Sampling",
    "label": "Rankings and agreement",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
}

KNOWN_CURVES = {
    "objective/scores": "Score",
    "objective/kl": "KL to the baseline, nats per completion",
    "gen/length_mean": "Completion length, tokens",
    "objective/entropy": "Entropy, nats per completion",
    "val/var_explained": "Variance explained by the value model, 1 is all",
    "train/loss": "Training loss, nats per token",
    "train/token_accuracy": "Share of tokens guessed right in training",
    "objective/rlhf_reward": "Score less KL penalty",
    "gen/eos_rate": "Share that ended by itself",
    "gen/distinct2": "Distinct-2, share",
    "policy/approxkl_avg": "KL moved by one update, nats per token",
    "policy/clipfrac_avg": "Share of clipped ratios",
    "objective/kl_coef": "KL coefficient",
    "loss/policy_avg": "Policy loss",
    "loss/value_avg": "Value loss",
}
"""What is drawn where a stage names no curves, in this order, with titles in plain words."""

SHOWN_CURVES = 6
"""So many of these are shown at once; the rest is folded."""

HOW = (
    "{Baseline} {Annotators} ranked completions that it wrote, a reward model learned to predict their rankings, and "
    "PPO trained the policy to score higher without moving far from the baseline. {Judge}"
)

TIME = {"step", "episode", "epoch", "tokens"}
"""Keys that only grow: curves over these are joined, over others only points are drawn."""

AXES = {"objective/kl": "KL to the baseline, nats per completion", "episode": "completions sampled so far"}

MOST_UNKNOWN_CURVES = 6


@dataclass(frozen=True)
class _Stage:
    """All that a stage's folder says."""

    name: str
    config: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    alerts: list[dict[str, Any]]
    summary: dict[str, Any]
    data: ReportData

    @property
    def title(self) -> str:
        return self.data.title or TITLES.get(self.name, self.name)


def render(folder: Path) -> Path:
    """Write `report.html` into a stage's folder, or into a run's folder and those of all its stages. Returns its path.

    Raises DataError where the folder holds neither.
    """
    folder = Path(folder).resolve()
    if _is_stage(folder):
        return _write(folder, _stage_page(_read_stage(folder), run=folder.parent.name))
    folders = [inner for inner in sorted(folder.iterdir()) if _is_stage(inner)] if folder.is_dir() else []
    if not folders:
        raise DataError(
            f"{folder} holds no run: expected {CONFIG} or {METRICS} in it, or in folders of it such as {folder / 'ppo'}"
        )
    stages = [_read_stage(inner) for inner in folders]
    for inner, stage in zip(folders, stages, strict=True):
        _write(inner, _stage_page(stage, run=folder.name))
    return _write(folder, _run_page(folder.name, sorted(stages, key=_order)))


def _write(folder: Path, content: str) -> Path:
    write_atomically(folder / REPORT, content)
    return folder / REPORT


def _is_stage(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, METRICS, ENVIRONMENT, REPORT_DATA))


def _read_stage(folder: Path) -> _Stage:
    environment = read_json(folder / ENVIRONMENT)
    config = folder / CONFIG
    return _Stage(
        name=environment.get("stage") or folder.name,
        config=without_passwords(config.read_text(encoding="utf-8")) if config.is_file() else "",
        environment=environment,
        metrics=read_records(folder / METRICS),
        samples=read_records(folder / SAMPLES),
        alerts=read_records(folder / ALERTS),
        summary=read_json(folder / SUMMARY),
        data=read_report_data(folder) or ReportData(title=""),
    )


def _order(stage: _Stage) -> tuple[int, str]:
    return (STAGES.index(stage.name) if stage.name in STAGES else len(STAGES), stage.name)


def _stage_page(stage: _Stage, *, run: str) -> str:
    found = [*_content(stage), page.section("Samples", page.samples_block(_samples(stage)))]
    body = [
        page.heading(f"{stage.title}: {run}", _when([stage])),
        page.verdict(stage.data.verdict),
        page.words_used("".join([stage.data.verdict, *found])),
        *found,
        *_provenance([stage]),
    ]
    return page.document(f"{stage.title}: {run}", body)


def _run_page(name: str, stages: Sequence[_Stage]) -> str:
    by_name = {stage.name: stage for stage in stages}
    final = by_name.pop("evaluate", None)
    ppo = by_name.pop("ppo", None)
    newest_first = sorted(stages, key=_order, reverse=True)
    with_samples = next((stage for stage in newest_first if _samples(stage)), None)
    told = final and final.data.verdict
    found = [
        *(_content(final, _rollouts(ppo)) if final else ()),
        page.section("What was done", page.table(_stages_table(stages), style="stages")),
        page.section(_samples_title(with_samples), page.samples_block(_samples(with_samples))) if with_samples else "",
        _stage_section(ppo) if ppo else "",
        *(_stage_section(stage) for stage in newest_first if stage.name in by_name),
    ]
    body = [
        page.heading(name, _when(stages)),
        page.verdict(final.data.verdict if final else ""),
        f"<p>{text(_how(by_name, final))}</p>" if told else "",
        ""
        if told
        else '<p class="soft">This run has not been evaluated yet: reload the page to see how far it is.</p>',
        page.words_used("".join(found)),
        *found,
        *_provenance(stages),
    ]
    return page.document(f"{name}: report", body)


def _how(by_name: Mapping[str, _Stage], final: _Stage | None) -> str:
    """What the loop did, who ranked and who judged: a reader must know what the verdict can say."""
    simulated = bool(_settings(by_name.get("label")).get("simulate"))
    model = _settings(final).get("baseline") or "a language model"
    taught = "A language model was fine-tuned on demonstrations; that is the baseline."
    as_it_is = f"The baseline is {model} as it is: there were no demonstrations."
    judge = _settings(final).get("judge")
    unlike_people = "simulated annotators" if simulated else "annotators"
    by_judge = f"Which of two completions wins was decided by {judge}, which PPO was not trained on."
    by_reward = (
        "Which of two completions wins was decided by the reward model that PPO was trained on, so this shows that PPO "
        "works, not that people prefer the result."
    )
    words = {"Baseline": taught if "sft" in by_name else as_it_is}
    words |= {"Annotators": unlike_people.capitalize(), "Judge": by_judge if judge else by_reward}
    return HOW.format(**words)


def _settings(stage: _Stage | None) -> Mapping[str, Any]:
    import yaml

    return (yaml.safe_load(stage.config) or {}) if stage else {}


def _samples_title(stage: _Stage) -> str:
    return "Before and after: samples side by side" if stage.name == "evaluate" else f"Samples: {stage.title}"


def _rollouts(ppo: _Stage | None) -> Line | None:
    """The way that PPO took: its score over its KL, of training prompts."""
    rows = [row for row in (ppo.metrics if ppo else ()) if {"objective/kl", "objective/scores"} <= row.keys()]
    if not rows:
        return None
    xs, ys = (tuple(row[name] for row in rows) for name in ("objective/kl", "objective/scores"))
    return Line("policy during PPO, on training prompts", xs, ys, joined=False)


def _stage_section(stage: _Stage) -> str:
    sentence = f"<p>{text(stage.data.verdict)}</p>" if stage.data.verdict else ""
    return page.section(stage.title, sentence, *_content(stage))


def _content(stage: _Stage, rollouts: Line | None = None) -> list[str]:
    """Facts, alerts, charts and tables of a stage. `rollouts` are drawn with the reward against KL."""
    data = stage.data
    facts = data.facts or tuple(Fact(name, value) for name, value in stage.summary.items())
    curves = [_curve(curve, stage.metrics) for curve in data.curves or _default_curves(stage.metrics)]
    return [
        page.facts_table(facts),
        page.alert_list(stage.alerts),
        page.charts(
            [_plot(plot, rollouts) for plot in data.plots] + curves[:SHOWN_CURVES], folded=curves[SHOWN_CURVES:]
        ),
        *(page.table(content) for content in data.tables),
    ]


def _plot(plot: Plot, rollouts: Line | None) -> str:
    beside = (rollouts,) if rollouts and plot.title == AGAINST_KL["score"] else ()
    return chart(plot.title, plot.x_label, (*plot.lines, *beside), y_label=plot.y_label, note=plot.note)


def _default_curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The metrics that readers know first; where there are none of these, the first few that have a course."""
    present = {name for row in metrics for name, value in row.items() if isinstance(value, int | float)}
    known = [Curve(title, (name,)) for name, title in KNOWN_CURVES.items() if name in present]
    if {"objective/scores", "objective/kl"} <= present:
        known.insert(SHOWN_CURVES - 1, Curve("Score against KL", ("objective/scores",), x="objective/kl"))
    others = sorted(name for name in present - TIME - {"lr"} if not name.startswith("timing/"))
    most = MOST_UNKNOWN_CURVES if len(metrics) > 1 else 0
    return known or [Curve(name, (name,)) for name in others[:most]]


def _curve(curve: Curve, metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name in curve.y:
        rows = [row for row in metrics if name in row and row.get(curve.x) is not None]
        xs, ys = tuple(row[curve.x] for row in rows), tuple(row[name] for row in rows)
        lines.append(Line(name, xs, ys, joined=curve.x in TIME))
    source = curve.y[0] if len(curve.y) == 1 and curve.y[0] != curve.title else ""
    return chart(curve.title, AXES.get(curve.x, curve.x), lines, note=curve.note, source=source)


def _samples(stage: _Stage) -> Samples | None:
    """The stage's own choice of samples, else those it logged, the latest first."""
    if stage.data.samples or not stage.samples:
        return stage.data.samples
    constant = {"table"} | ({"step"} if len({row.get("step") for row in stage.samples}) == 1 else set())
    columns = tuple(dict.fromkeys(name for row in stage.samples for name in row if name not in constant))
    latest_first = sorted(stage.samples, key=lambda row: -row.get("step", 0))
    return Samples(columns, tuple(tuple(row.get(name) for name in columns) for row in latest_first))


def _stages_table(stages: Sequence[_Stage]) -> Table:
    rows = tuple(
        (
            TITLES.get(stage.name, stage.name),
            _status(stage),
            page.stage_time(stage.environment),
            stage.data.verdict,
        )
        for stage in stages
    )
    seconds = sum(stage.environment.get("seconds") or 0 for stage in stages)
    note = f"Time is in minutes:seconds; all stages together took {duration(seconds)}."
    return Table("", ("stage", "status", "time", "result"), rows, note=note)


def _status(stage: _Stage) -> str:
    status = stage.environment.get("status", page.NOTHING)
    alerts = len(stage.alerts)
    return f"{status}, {alerts} alert{'s' if alerts > 1 else ''}" if alerts else status


def _when(stages: Sequence[_Stage]) -> str:
    started = min((stage.environment.get("started_at") or "" for stage in stages), default="")
    seeds = sorted({str(stage.environment["seed"]) for stage in stages if stage.environment.get("seed") is not None})
    parts = [
        f"started {started.replace('T', ' ')[:16]} UTC" if started else "",
        f"seed {', '.join(seeds)}" if seeds else "",
    ]
    return " · ".join(part for part in parts if part)


def _provenance(stages: Sequence[_Stage]) -> list[str]:
    """How to do it again, with what settings, on what."""
    typed = list(dict.fromkeys(stage.environment["command"] for stage in stages if stage.environment.get("command")))
    environment = next((stage.environment for stage in reversed(stages) if stage.environment), {})
    return [
        page.section("How to reproduce", *_again(typed, environment), _one_stage_alone(stages) if typed else ""),
        page.section("Settings", *(page.settings(f"{stage.name}/{CONFIG}", stage.config) for stage in stages)),
        page.section("Environment", page.environment_table(environment)),
    ]


def _again(typed: Sequence[str], environment: Mapping[str, Any]) -> list[str]:
    """The commands that were typed, after those that bring back the code and the versions."""
    revision = (environment.get("git") or "").removesuffix("-dirty")
    code = [f"git checkout {revision}", "pip install -c constraints.txt -e '.[demo]'"] if revision else []
    dirty = "Files differed from this revision. " if (environment.get("git") or "").endswith("-dirty") else ""
    same = "The same seed gives the same numbers on the same processor, number of threads and versions."
    return [page.commands([*code, *typed]), f'<p class="soft">{dirty}{same}</p>'] if typed else []


def _one_stage_alone(stages: Sequence[_Stage]) -> str:
    names = [stage.name for stage in stages if stage.name in STAGES and stage.config]
    if not names:
        return ""
    command = f"rlhf {names[-1]} --config {names[-1]}/{CONFIG} --output somewhere/else"
    return f'<p class="soft">One stage alone, from its settings: <code>{text(command)}</code></p>'

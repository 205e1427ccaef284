"""One self-contained HTML page of a stage or of a whole run, from the files that the stages left.

A stage that wants more than its curves writes `report.json` (`write_report_data`); one that does not gets a page too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import report_page as page
from rlhf.config import STAGES
from rlhf.environment import without_passwords
from rlhf.figures import chart, text
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
    "objective/kl": "KL to the reference, nats per completion",
    "objective/rlhf_reward": "Score less KL penalty",
    "gen/length_mean": "Completion length, tokens",
    "gen/eos_rate": "Share that ended by itself",
    "objective/entropy": "Entropy, nats per completion",
    "val/var_explained": "Variance explained by the value model",
    "policy/approxkl_avg": "KL moved by one update",
    "policy/clipfrac_avg": "Share of clipped ratios",
    "objective/kl_coef": "KL coefficient",
    "loss": "Training loss",
    "eval/loss": "Held-out loss",
    "eval/accuracy": "Held-out pair accuracy",
    "accuracy": "Training pair accuracy",
    "margin": "Score margin of the better completion",
    "loss/policy_avg": "Policy loss",
    "loss/value_avg": "Value loss",
}
"""What is drawn where a stage names no curves, in this order, with titles in plain words."""

TIME = {"step", "episode", "epoch"}
"""Keys that only grow: curves over these are joined, over others only points are drawn."""

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
    body = [
        page.heading(f"{stage.title}: {run}", _when([stage])),
        page.verdict(stage.data.verdict),
        *_content(stage),
        page.section("Samples", page.samples_block(_samples(stage))),
        *_provenance([stage]),
    ]
    return page.document(f"{stage.title}: {run}", body)


def _run_page(name: str, stages: Sequence[_Stage]) -> str:
    by_name = {stage.name: stage for stage in stages}
    final = by_name.pop("evaluate", None)
    ppo = by_name.pop("ppo", None)
    with_samples = next((stage for stage in (final, ppo) if stage and _samples(stage)), None)
    missing = "" if final else "This run has not been evaluated yet."
    body = [
        page.heading(name, _when(stages)),
        page.verdict(final.data.verdict if final else ""),
        f'<p class="soft">{missing}</p>' if missing else "",
        *(_content(final) if final else ()),
        page.section("What was done", page.table(_stages_table(stages), style="stages")),
        _stage_section(ppo) if ppo else "",
        page.section("Samples side by side", page.samples_block(_samples(with_samples))) if with_samples else "",
        *(_stage_section(stage) for stage in sorted(by_name.values(), key=_order, reverse=True)),
        *_provenance(stages),
    ]
    return page.document(f"{name}: report", body)


def _stage_section(stage: _Stage) -> str:
    sentence = f"<p>{text(stage.data.verdict)}</p>" if stage.data.verdict else ""
    return page.section(stage.title, sentence, *_content(stage))


def _content(stage: _Stage) -> list[str]:
    """Facts, charts, tables and alerts of a stage."""
    data = stage.data
    facts = data.facts or tuple(Fact(name, value) for name, value in stage.summary.items())
    curves = data.curves or _default_curves(stage.metrics)
    figures = [chart(plot.title, plot.x_label, plot.lines, y_label=plot.y_label, note=plot.note) for plot in data.plots]
    figures += [_curve(curve, stage.metrics) for curve in curves]
    return [
        page.facts_table(facts),
        page.charts(figures),
        *(page.table(content) for content in data.tables),
        page.alert_list(stage.alerts),
    ]


def _default_curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The metrics that readers know first; where there are none of these, the first few that have a course."""
    present = {name for row in metrics for name, value in row.items() if isinstance(value, int | float)}
    known = [Curve(title, (name,)) for name, title in KNOWN_CURVES.items() if name in present]
    if {"objective/scores", "objective/kl"} <= present:
        known.insert(2, Curve("Score against KL", ("objective/scores",), x="objective/kl"))
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
    return chart(curve.title, curve.x, lines, note=curve.note, source=source)


def _samples(stage: _Stage) -> Samples | None:
    """The stage's own choice of samples, else those it logged, the latest first."""
    if stage.data.samples or not stage.samples:
        return stage.data.samples
    columns = tuple(dict.fromkeys(name for row in stage.samples for name in row if name != "table"))
    latest_first = sorted(stage.samples, key=lambda row: -row.get("step", 0))
    return Samples(columns, tuple(tuple(row.get(name) for name in columns) for row in latest_first))


def _stages_table(stages: Sequence[_Stage]) -> Table:
    rows = tuple(
        (
            TITLES.get(stage.name, stage.name),
            stage.environment.get("status", page.NOTHING),
            page.stage_time(stage.environment),
            stage.data.verdict,
        )
        for stage in stages
    )
    return Table("", ("stage", "status", "time", "result"), rows, note="Time is in minutes:seconds.")


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
        page.section("How to reproduce", page.commands(typed), _one_stage_alone(stages) if typed else ""),
        page.section("Settings", *(page.settings(f"{stage.name}/{CONFIG}", stage.config) for stage in stages)),
        page.section("Environment", page.environment_table(environment)),
    ]


def _one_stage_alone(stages: Sequence[_Stage]) -> str:
    names = [stage.name for stage in stages if stage.name in STAGES and stage.config]
    if not names:
        return ""
    command = f"rlhf {names[-1]} --config {names[-1]}/{CONFIG} --output somewhere/else"
    return f'<p class="soft">One stage alone, from its settings: <code>{text(command)}</code></p>'

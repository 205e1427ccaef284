"""The stages in order: what each takes from those before it, which are done, and where an interrupted one goes on.

A stage is done when its folder holds a `done.json` with the fingerprint of its settings and of what it read. The stage
itself resumes from its own checkpoints; the pipeline only decides whether it may: `started.json` says for which
fingerprint the checkpoints were made.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rlhf.config import STAGES, Precision, RunConfig, needed
from rlhf.contract import Contract
from rlhf.data import resolve as resolve_function
from rlhf.fingerprint import DONE, fingerprint
from rlhf.memory import keep_freed_memory
from rlhf.progress import is_main_process, quiet, say
from rlhf.report_data import read_report_data
from rlhf.run_folder import CONFIG, ENVIRONMENT, LOCK, REPORT, SAMPLES, held, read_json, read_records, write_json
from rlhf.soft_labels import SOFT_LABELS
from rlhf.stopping import stop_request
from rlhf.types import ConfigError, DataError, RewardFn, UserError

MODULES = {
    "sft": "rlhf.sft",
    "sample": "rlhf.sample",
    "label": "labeling_ui.stage",
    "reward": "reward_models.stage",
    "ppo": "rlhf.ppo",
    "evaluate": "rlhf.evaluation",
}
"""The module whose `run(config)` does a stage's work; imported when the stage runs, so that the others cost nothing."""

NEEDED = {"sft": ("data",), "sample": ("prompts",), "ppo": ("prompts",), "evaluate": ("prompts",)}
"""Fields that no earlier stage can fill."""

SHOWN_SAMPLES = 3
REPORT_EVERY_SECONDS = 20.0

STARTED = "started.json"
OWN_FILES = (STARTED, DONE, ENVIRONMENT, "label.json")
"""By these a folder is known to hold a stage's results; `rlhf label`, run by hand, leaves only the last."""


def run(
    config: RunConfig, *, start: str | None = None, stop: str | None = None, only: str | None = None
) -> Path | None:
    """Run the stages that are not done, and render the report. Returns its path, or None where people must rank first.

    `start` runs that stage and all after it again, `only` that stage alone; `stop` is the last stage to run.
    Raises UserError for settings that cannot be, or while another process works on the same run.
    """
    chosen = _chosen(start, stop, only)
    if config.sft.data is None and "sft" in chosen and "sft" not in (start, stop, only):
        chosen = [name for name in chosen if name != "sft"]
        say(f"sft: left out, there is no sft.data: everything starts from {config.sft.model} as it is")
    stages = resolve(config)
    for name in chosen:
        for field in NEEDED.get(name, ()):
            needed(getattr(stages[name], field), f"{name}.{field}", f"{name}.{field}")
    folder = Path(config.runs) / config.name
    with held(folder, otherwise="give this run another --name or --runs"):
        say(f"{' > '.join(chosen)}; look on in {folder / REPORT}, which is renewed as the run goes on")
        for name in chosen:
            if name == "label" and stages[name].simulate is None:
                if not _people_are_done(stages[name]):
                    return None
            else:
                with _report_renewed(folder):
                    _run_stage(name, stages, forced=bool(start or only))
        if "evaluate" in chosen:
            _print_results(Path(stages["evaluate"].output))
        return _report(folder)


def _chosen(start: str | None, stop: str | None, only: str | None) -> Sequence[str]:
    for name in (start, stop, only):
        if name is not None and name not in STAGES:
            raise ConfigError(f"there is no stage {name!r}: choose one of {', '.join(STAGES)}")
    if only is not None:
        if start or stop:
            raise ConfigError("only says it all: leave out from and to")
        return (only,)
    first, last = STAGES.index(start or STAGES[0]), STAGES.index(stop or STAGES[-1])
    if first > last:
        raise ConfigError(f"there is nothing from {start} to {stop}: the order is {', '.join(STAGES)}")
    return STAGES[first : last + 1]


MADE_FROM_SETTINGS = ("sft", "reward", "ppo", "evaluate")
"""Stages of which all that counts is in their folder; samples and rankings are in the store."""


def run_alone(name: str, config: Any) -> None:
    """One stage by hand. What `rlhf run` noted of its folder is then no longer true of it: it will do it again."""
    run_stage(name, config, by_hand=True)


def run_stage(name: str, config: Any, *, by_hand: bool = False) -> None:
    """Do one stage's work, or go on with it. Raises UserError for checkpoints of another training in its folder."""
    quiet()
    keep_freed_memory()
    voided = by_hand and name in MADE_FROM_SETTINGS and is_main_process()
    with _alone(name, config), _marks_voided(Path(config.output)) if voided else nullcontext():
        with stop_request():  # a library that is being imported may swallow Ctrl-C
            work = import_module(MODULES[name]).run
        if name in ("ppo", "evaluate"):
            work(config, load_reward=partial(load_reward, precision=config.precision))
        else:
            work(config)
        if name in ("sft", "ppo"):  # the others have said what came out
            _tell(name, Path(config.output))


@contextmanager
def _marks_voided(folder: Path) -> Iterator[None]:
    """The marks of `rlhf run` go before anything else does, and come back where the stage refused before it wrote."""
    marks = {mark: mark.read_bytes() for mark in (folder / STARTED, folder / DONE) if mark.is_file()}
    before = _last_written(folder)
    for mark in marks:
        mark.unlink()
    try:
        yield
    except UserError:
        if _last_written(folder) == before:
            for mark, content in marks.items():
                mark.write_bytes(content)
        raise


def _last_written(folder: Path) -> tuple[int, int] | None:
    """Changes when a stage begins to write: each begins with its configuration."""
    path = folder / CONFIG
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def _alone(name: str, config: Any) -> AbstractContextManager[None]:
    """Hold the stage's folder. Several people may rank at once, each on a page of their own."""
    if not is_main_process() or (name == "label" and config.simulate is None):
        return nullcontext()
    return held(Path(config.output), otherwise="choose another --output")


def load_reward(source: str, policy: Contract, *, precision: Precision = "auto") -> RewardFn:
    """The reward that `source` names: any callable as `module:function`, or a reward model's folder.

    Raises ContractError where the reward model would read another text than the policy writes.
    """
    if ":" in source and not Path(source).exists():
        return resolve_function(source)
    from reward_models.model import RewardModel

    model = RewardModel.load(source, precision=precision)
    model.check_policy(policy, name="the policy")
    return model


# ------------------------------------------------------------------------------------------------------ the wiring


def resolve(config: RunConfig) -> dict[str, Any]:
    """Each stage's config with everything filled in that the run, or the stages before it, decide.

    Without demonstrations (`sft.data`), what the others start from is `sft.model` itself.
    Raises ConfigError when stages disagree about the split.
    """
    folder = Path(config.runs) / config.name
    common: dict[str, Any] = {"held_out": _held_out(config), "tracking": config.tracking}
    if config.seed is not None:
        common["seed"] = config.seed

    def stage(name: str, **values: Any) -> Any:
        filled = _filled(getattr(config, name), output=str(folder / name), **common, **values)
        return replace(filled, tracking=_filled(filled.tracking, group=config.name))

    def with_prompts(stage: Any) -> dict[str, Any]:
        return {} if stage.prompts else {"prompts": config.sample.prompts, "columns": config.sample.columns}

    sft = stage("sft")
    begin = sft.model if sft.data is None else _model(sft)
    sample = stage("sample", model=begin, store=str(folder / "labels.db"), **(_limits(sft) if sft.data else {}))
    limits = _limits(sample)
    label = stage("label", store=sample.store)
    if label.simulate and config.seed is not None:
        label = replace(label, simulate=replace(label.simulate, seed=config.seed))
    rankings = f"{label.output}/{SOFT_LABELS}" if config.reward.soft_labels else label.store
    reward = stage("reward", model=begin, rankings=rankings, **limits)
    ppo = stage("ppo", model=begin, reward=_model(reward), **limits, **with_prompts(config.ppo))
    compared = {"policy": _model(ppo), "baseline": ppo.model, "reward": ppo.reward}
    evaluate = stage("evaluate", **compared, **limits, **with_prompts(config.evaluate))
    return {"sft": sft, "sample": sample, "label": label, "reward": reward, "ppo": ppo, "evaluate": evaluate}


def _model(stage: Any) -> str:
    return f"{stage.output}/model"


def _limits(stage: Any) -> dict[str, int]:
    """How long prompts and completions may be: what one stage says, those after it that say nothing take over."""
    return {name: getattr(stage, name) for name in ("max_prompt_tokens", "max_completion_tokens")}


def _filled(config: Any, **values: Any) -> Any:
    """`config` with those of the fields set that it has and that still have their default."""
    plain = type(config)()
    unset = {name: value for name, value in values.items() if getattr(config, name, ...) == getattr(plain, name, None)}
    return replace(config, **unset)


def _held_out(config: RunConfig) -> float:
    """The one share that all stages keep out of training."""
    own = {name: getattr(config, name).held_out for name in STAGES if hasattr(getattr(config, name), "held_out")}
    default = type(config.sft)().held_out
    chosen = {value for value in own.values() if value != default}
    if len(chosen) > 1:
        shown = ", ".join(f"{name}.held_out {value}" for name, value in own.items())
        raise ConfigError(f"the stages must keep the same prompts out of training, but {shown}: set one of them")
    return chosen.pop() if chosen else default


# ------------------------------------------------------------------------------------------------- done, or not yet


def _run_stage(name: str, stages: Mapping[str, Any], *, forced: bool) -> None:
    config = stages[name]
    folder = Path(config.output)
    with stop_request():  # in SQLAlchemy's callbacks Ctrl-C would be lost
        mark = fingerprint(config, _also_read(name, stages))
    done, started = _mark(folder / DONE), _mark(folder / STARTED)
    if done == mark and not forced and _has_result(name, config):
        say(f"{name}: nothing has changed since it was done, skipped")
        return
    if started == mark and done is None:
        say(f"{name}: goes on in {folder}, where it was interrupted")
    else:
        with _alone(name, config):  # nobody may be writing there
            pass
        _set_aside(name, folder)
        _make_room(name, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, {"fingerprint": mark})
    say(f"{name}: running, results go to {folder}")
    run_stage(name, config)
    write_json(folder / DONE, {"fingerprint": mark, "finished_at": datetime.now(UTC).isoformat()})
    with stop_request():  # as above
        gc.collect()  # the models of this stage, before those of the next are loaded


def _also_read(name: str, stages: Mapping[str, Any]) -> dict[str, str | None]:
    """What a stage reads besides what its fields name: annotators look at the samples in the store."""
    return {"samples": _model(stages["sample"])} if name == "label" else {}


def _mark(path: Path) -> str | None:
    return (read_json(path) or {}).get("fingerprint")


def _set_aside(name: str, folder: Path) -> None:
    """Keep the last result of other settings or inputs beside the new one, so that its checkpoints are not resumed.

    Raises ConfigError for a folder that holds something else than a stage.
    """
    begun = {LOCK, f"{STARTED}.new"}  # all that a process killed at its first word may leave
    if not folder.is_dir() or all(each.name in begun for each in folder.iterdir()):
        return
    if not any((folder / own).is_file() for own in OWN_FILES):
        raise ConfigError(f"{folder} holds files that no stage has written: choose another --{name}.output")
    previous = folder.parent / "previous" / folder.name
    shutil.rmtree(previous, ignore_errors=True)
    previous.parent.mkdir(exist_ok=True)
    folder.rename(previous)
    say(f"{name}: {folder} held the result of other settings or inputs, or is to be done again; it is now {previous}")


def _make_room(name: str, config: Any) -> None:
    """Take samples and simulated rankings that are to be made again out of the store; people's rankings stay."""
    if name not in ("sample", "label") or not ("://" in config.store or Path(config.store).is_file()):
        return
    from rlhf.renewal import forget
    from rlhf.store import Store

    with closing(Store(config.store)) as store:
        forget(store, round=config.round, samples=name == "sample")


def _has_result(name: str, config: Any) -> bool:
    """Whether what the next stages read is still there."""
    if name in ("sample", "label"):
        return "://" in config.store or Path(config.store).is_file()
    return name == "evaluate" or Path(_model(config)).is_dir()


# --------------------------------------------------------------------------------------------- people, and the result


def _people_are_done(config: Any) -> bool:
    """Whether every item has a ranking; says how to rank, and how to go on, where one has none."""
    from rlhf.store import Store

    with closing(Store(config.store, create=False)) as store:
        ranked = {_item_key(each.prompt, each.completions) for each in store.rankings(rounds=[config.round])}
        items = [_item_key(each.prompt, [c.text for c in each.completions]) for each in store.items(config.round)]
    open_items = sum(item not in ranked for item in items)
    if open_items == 0:
        say(f"label: all {len(items)} items of {config.store} are ranked")
        return True
    say(
        f"label: {open_items} of {len(items)} items wait for a person's ranking.\n"
        f"  rank them:  rlhf label --store {config.store} --output {config.output}\n"
        f"  then go on: repeat this command (or add `--from reward` to use the {len(ranked)} that are ranked)"
    )
    return False


def _item_key(prompt: Any, texts: Sequence[str]) -> str:
    return json.dumps([prompt, list(texts)], sort_keys=True)


def _tell(name: str, folder: Path) -> None:
    """A stage's result in a sentence, and a few of its samples, a line each."""
    data, rows = read_report_data(folder), read_records(folder / SAMPLES)
    if data and data.verdict:
        say(f"{name}: {data.verdict}")
    for row in [row for row in rows if row.get("step") == rows[-1].get("step")][:SHOWN_SAMPLES]:
        say(_one_line(f"  {row.get('prompt')} |{row.get('completion')}", shutil.get_terminal_size().columns))


def _one_line(words: str, width: int) -> str:
    """What a model wrote, as one harmless line of a terminal: control characters could rewrite the screen."""
    flat = re.sub(r"\s+", " ", words.strip())
    shown = "  " + "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in flat)
    return shown if len(shown) < width else f"{shown[: width - 2]}…"


@contextmanager
def _report_renewed(folder: Path) -> Iterator[None]:
    """Write the run's report now and then while a stage runs, and when it is done."""
    over = Event()

    def renew() -> None:
        from rlhf.report import render

        while not over.wait(REPORT_EVERY_SECONDS):
            with suppress(DataError, OSError, ValueError):  # nothing to show yet, or a line half written
                render(folder)

    thread = Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    from rlhf.report import render

    with suppress(DataError):  # a stage may write elsewhere
        render(folder)


def _report(folder: Path) -> Path:
    from rlhf.report import render

    path = render(folder)
    print(f"report: {path}")
    if all((folder / name / "model").is_dir() for name in ("sft", "ppo")):
        say(f"talk to the SFT and the PPO policy side by side: rlhf chat --run {folder}")
    return path


def _print_results(folder: Path) -> None:
    """What the evaluation found, as a person reads it in a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    data = read_report_data(folder)
    for each in data.tables if data else ():
        table = Table(*map(escape, each.columns), title=escape(each.title), caption=escape(each.note) or None)
        for row in each.rows:
            table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else escape(str(cell)) for cell in row))
        console.print(table)
    if data and data.verdict:
        console.print(escape(data.verdict))

"""The stages in order: what each takes from those before it, which are done, and where an interrupted one goes on.

A stage is done when its folder holds a `done.json` with the fingerprint of its settings and of what it read. The stage
itself resumes from its own checkpoints; the pipeline only decides whether it may: `started.json` says for which
fingerprint the checkpoints were made.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf.config import STAGES, RunConfig, needed
from rlhf.contract import digest
from rlhf.progress import quiet, say
from rlhf.run_folder import ENVIRONMENT, SUMMARY, read_json, write_json
from rlhf.types import ConfigError

MODULES = {
    "sft": "rlhf.sft",
    "sample": "rlhf.sample",
    "label": "labeling_ui.stage",
    "reward": "reward_models.stage",
    "ppo": "rlhf.ppo",
    "evaluate": "rlhf.evaluation",
}
"""The module whose `run(config)` does a stage's work; imported when the stage runs, so that the others cost nothing."""

INPUTS = {
    "sft": ("data", "model"),
    "sample": ("model", "prompts"),
    "label": ("guidelines",),
    "reward": ("model", "rankings"),
    "ppo": ("model", "reward", "prompts"),
    "evaluate": ("policy", "baseline", "reward", "judge", "prompts"),
}
"""Fields that name something a stage reads; its content counts, not its name alone."""

NEEDED = {"sft": ("data",), "sample": ("prompts",), "ppo": ("prompts",), "evaluate": ("prompts",)}
"""Fields that no earlier stage can fill."""

DONE, STARTED = "done.json", "started.json"


def run(
    config: RunConfig, *, start: str | None = None, stop: str | None = None, only: str | None = None
) -> Path | None:
    """Run the stages that are not done, and render the report. Returns its path, or None where people must rank first.

    `start` runs that stage and all after it again, `only` that stage alone; `stop` is the last stage to run.
    Raises UserError for settings that cannot be, or while another process works on the same run.
    """
    chosen = _chosen(start, stop, only)
    stages = resolve(config)
    for name in chosen:
        for field in NEEDED.get(name, ()):
            needed(getattr(stages[name], field), f"{name}.{field}", f"{name}.{field}")
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for name in chosen:
            if name == "label" and stages[name].simulate is None:
                if not _people_are_done(stages[name], config):
                    return None
            else:
                _run_stage(name, stages, forced=bool(start or only))
        return _conclude(folder, Path(stages["evaluate"].output))


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


def run_stage(name: str, config: Any) -> None:
    """Do one stage's work, whatever was done before."""
    quiet()
    import_module(MODULES[name]).run(config)


# ------------------------------------------------------------------------------------------------------ the wiring


def resolve(config: RunConfig) -> dict[str, Any]:
    """Each stage's config with everything filled in that the run, or the stages before it, decide.

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
    sample = stage("sample", model=_model(sft), store=str(folder / "labels.db"))
    label = stage("label", store=sample.store)
    if label.simulate and config.seed is not None:
        label = replace(label, simulate=replace(label.simulate, seed=config.seed))
    reward = stage("reward", model=_model(sft), rankings=label.store)
    ppo = stage("ppo", model=_model(sft), reward=_model(reward), **with_prompts(config.ppo))
    compared = {"policy": _model(ppo), "baseline": ppo.model, "reward": ppo.reward}
    evaluate = stage("evaluate", **compared, **with_prompts(config.evaluate))
    return {"sft": sft, "sample": sample, "label": label, "reward": reward, "ppo": ppo, "evaluate": evaluate}


def _model(stage: Any) -> str:
    return f"{stage.output}/model"


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
    mark = fingerprint(name, stages)
    done, started = _mark(folder / DONE), _mark(folder / STARTED)
    if done == mark and not forced and _has_result(name, config):
        say(f"{name}: nothing has changed since it was done, skipped")
        return
    if started == mark and done is None:
        say(f"{name}: goes on in {folder}, where it was interrupted")
    else:
        _set_aside(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, {"fingerprint": mark})
    say(f"{name}: running, results go to {folder}")
    run_stage(name, config)
    write_json(folder / DONE, {"fingerprint": mark, "finished_at": datetime.now(UTC).isoformat()})
    gc.collect()  # the models of this stage, before those of the next are loaded


def _mark(path: Path) -> str | None:
    return (read_json(path) or {}).get("fingerprint")


def _set_aside(name: str, folder: Path) -> None:
    """Keep the last result of other settings or inputs beside the new one, so that its checkpoints are not resumed.

    Raises ConfigError for a folder that holds something else than a stage.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / own).is_file() for own in (STARTED, DONE, ENVIRONMENT)):
        raise ConfigError(f"{folder} holds files that no stage has written: choose another --{name}.output")
    previous = folder.with_name(f"{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    folder.rename(previous)
    say(f"{name}: {folder} held the result of other settings or inputs, or is to be done again; it is now {previous}")


def _has_result(name: str, config: Any) -> bool:
    """Whether what the next stages read is still there."""
    if name in ("sample", "label"):
        return "://" in config.store or Path(config.store).is_file()
    return name == "evaluate" or Path(_model(config)).is_dir()


def fingerprint(name: str, stages: Mapping[str, Any]) -> str:
    """A hash of a stage's settings and of the content of what it reads; where its numbers are shown does not count."""
    config = stages[name]
    settings = asdict(config)
    del settings["tracking"]
    sources = {field: getattr(config, field) for field in INPUTS[name]}
    if name == "label":
        sources |= {"sample": _model(stages["sample"]), "utility": config.simulate.utility}
    if name == "ppo":
        sources["ptx_data"] = config.extras.ptx_data
    contents = {field: content(source) for field, source in sources.items() if source is not None}
    return digest(json.dumps([settings, contents], sort_keys=True))


def content(source: str) -> str:
    """A hash of what stands behind a path, store, stage's model or `module:function`; the text itself for other names.

    A stage's result counts as new when the stage ran again. Rankings are read out of a store, so that a look at the
    database, which changes the file, does not count as a change.
    """
    path = Path(source)
    done = path.parent / DONE
    if path.name == "model" and done.is_file():
        return _file_hash(done)
    if "://" in source or (path.is_file() and path.suffix == ".db"):
        from rlhf.store import Store

        return Store(source).content_hash()
    if path.is_file():
        return _file_hash(path)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return digest("".join(f"{f.relative_to(path)} {f.stat().st_size} {f.stat().st_mtime_ns}\n" for f in files))
    return _function_hash(source)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _function_hash(source: str) -> str:
    module = source.partition(":")[0]
    try:
        spec = find_spec(module) if ":" in source else None
    except (ImportError, ValueError):  # no module after all; the stage itself says what is wrong with it
        spec = None
    return (
        f"{source} {_file_hash(Path(spec.origin))}" if spec and spec.origin and Path(spec.origin).is_file() else source
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder; raises ConfigError while another process does."""
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"process {file.read().strip()} is working in {folder}: wait for it, or give this run another --name"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


# --------------------------------------------------------------------------------------------- people, and the result


def _people_are_done(config: Any) -> bool:
    """Whether every item has a ranking; says how to rank, and how to go on, where one has none."""
    from rlhf.store import Store

    store = Store(config.store, create=False)
    ranked = {_item_key(ranking.prompt, ranking.completions, ranking.round) for ranking in store.rankings()}
    items = [_item_key(each.prompt, [c.text for c in each.completions], each.round) for each in store.items()]
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


def _item_key(prompt: Any, texts: Sequence[str], round: int) -> str:
    return json.dumps([prompt, list(texts), round], sort_keys=True)


def _conclude(folder: Path, evaluate: Path) -> Path:
    """Render the report, and print its path below the table of the evaluation, where there is one."""
    from rlhf import report

    path = report.render(folder)
    summary = read_json(evaluate / SUMMARY)
    if summary and (evaluate / DONE).is_file():
        _print_table(summary)
    print(f"report: {path}")
    return path

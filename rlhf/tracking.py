"""The run folder and, when asked, Weights & Biases. The only module that imports wandb.

A `Tracker` writes `config.yaml`, `env.json`, `metrics.jsonl`, `samples.jsonl`, `alerts.jsonl` and `summary.json`. Apart
from the keys `timing/*`, nothing in `metrics.jsonl` depends on the clock: the same seed gives the same file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cache
from io import FileIO
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote, urlparse

from rlhf.config import Tracking
from rlhf.environment import describe_environment, without_passwords
from rlhf.progress import is_main_process, say
from rlhf.run_folder import (
    ALERTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SAMPLES,
    SUMMARY,
    WANDB_ID,
    append_record,
    cut_after,
    finite,
    open_to_append,
    plain_cell,
    plain_number,
    read_json,
    write_atomically,
    write_json,
)
from rlhf.types import ConfigError

Level = Literal["info", "warn", "error"]
Mode = Literal["online", "offline", "off"]

AXES = ("step", "episode", "tokens", "epoch")
"""What a dashboard may put on the x-axis. PPO's curves start with episodes (completions sampled), others with steps."""

SOURCES = {
    **{"data": "dataset", "prompts": "dataset", "rankings": "dataset"},
    **{"model": "model", "policy": "model", "baseline": "model", "reward": "model"},
}
"""Fields of a config that name what a stage reads, with the kind of artifact that it is."""

RESULTS = {"model": "model", "rankings.jsonl": "dataset"}
"""What a stage may leave for the next ones."""

_MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
"""What WANDB_MODE may say."""


class Tracker:
    """Records one stage: `with Tracker(folder, stage="ppo", config=config, tracking=config.tracking) as tracker: ...`.

    Without `resume_step` the record of an earlier run in `folder` is replaced. With it, what was logged after that step
    is cut off, and the same wandb run goes on. On ranks other than 0 every method does nothing.
    """

    def __init__(
        self, folder: Path, *, stage: str, config: Any, tracking: Tracking, resume_step: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.stage = stage
        self._config = config
        self._tracking = tracking
        self._resume_step = resume_step
        self._step = resume_step or 0
        self._started = time.monotonic()
        self._earlier_seconds = 0.0
        self._summary: dict[str, Any] = {}
        self._metrics: FileIO | None = None
        self._wandb = _Wandb(None)

    def __enter__(self) -> Tracker:
        if not is_main_process():
            return self
        mode = wandb_mode(self._tracking)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._reopen()
        settings = resolved(self._config)
        write_atomically(self.folder / CONFIG, _to_yaml(settings))
        self._environment = describe_environment() | {
            "stage": self.stage,
            "seed": getattr(self._config, "seed", None),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write_environment("running")
        self._metrics = open_to_append(self.folder / METRICS)
        if mode != "off":
            self._wandb = _Wandb.start(self.folder, self.stage, settings, self._tracking, mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is None:
            return
        self._metrics.close()
        self._metrics = None
        status = "finished" if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        with suppress(OSError) if kind else nullcontext():  # the first error says more than a second
            self._write_environment(status)
        if kind is None:
            self._record_lineage()
        self._wandb.do(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Append one line to `metrics.jsonl`; a number that is not finite is written as null."""
        if self._metrics is None:
            return
        self._step = step
        values = {name: plain_number(metrics[name]) for name in sorted(metrics)}
        append_record(self._metrics, {"step": step} | {name: finite(value) for name, value in values.items()})
        self._wandb.do(lambda run: run.log(values | {"step": step}))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, step: int) -> None:
        """Record rows of texts and numbers, such as samples: `samples.jsonl`, and a table in wandb."""
        if self._metrics is None:
            return
        cells = [[plain_cell(value) for value in row] for row in rows]
        with open_to_append(self.folder / SAMPLES) as file:
            for row in cells:
                append_record(file, dict(zip(columns, row, strict=True)) | {"step": step, "table": name})
        self._wandb.do(lambda run: run.log({name: _wandb_table(columns, cells), "step": step}))

    def alert(self, title: str, text: str, level: Level = "warn") -> None:
        """Something a person should look at: on the console, in `alerts.jsonl` and in wandb."""
        if self._metrics is None:
            return
        say(f"{self.stage}: {level.upper()}: {title}: {text}")
        with open_to_append(self.folder / ALERTS) as file:
            append_record(file, {"step": self._step, "level": level, "title": title, "text": text})
        self._wandb.do(lambda run: run.alert(title, text, level=level.upper()))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The numbers that remain of the run, in `summary.json`; later values replace earlier ones of the same name."""
        if self._metrics is None:
            return
        self._summary |= {name: plain_cell(value) for name, value in values.items()}
        write_json(self.folder / SUMMARY, dict(sorted(self._summary.items())))
        self._wandb.do(lambda run: run.summary.update(self._summary))

    def artifact(self, kind: str, source: str | Path, *, used: bool = False) -> None:
        """Tell wandb of a result (a model, say), or of one that was used, by address and content; nothing is uploaded.

        The one who made it and those who use it give the same name and content, so that wandb links them.
        """
        self._wandb.do(lambda run: _log_artifact(run, _wandb_reference(kind, str(source)), used=used))

    def _record_lineage(self) -> None:
        """From what the config names to what lies in the folder."""
        if not self._wandb.is_on:
            return
        sources = {name: getattr(self._config, name, None) for name in SOURCES}
        for name, source in sources.items():
            if source:
                self.artifact(SOURCES[name], _rankings_of(source) if name == "rankings" else source, used=True)
        for name, kind in RESULTS.items():
            if (self.folder / name).exists():
                self.artifact(kind, self.folder / name)

    def _reopen(self) -> None:
        """Remove what an earlier run left in the folder, or cut it back to the step to go on from."""
        if self._resume_step is None:
            for name in (METRICS, SAMPLES, ALERTS, SUMMARY, WANDB_ID):
                (self.folder / name).unlink(missing_ok=True)
            return
        for name in (METRICS, SAMPLES, ALERTS):
            cut_after(self.folder / name, self._resume_step)
        self._summary = read_json(self.folder / SUMMARY)
        self._earlier_seconds = float(read_json(self.folder / ENVIRONMENT).get("seconds", 0.0))

    def _write_environment(self, status: str) -> None:
        seconds = self._earlier_seconds + time.monotonic() - self._started
        self._environment |= {"status": status, "seconds": round(seconds, 1)}
        write_json(self.folder / ENVIRONMENT, self._environment)


class _Wandb:
    """A wandb run that may fail without taking the training with it: one warning, then silence."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def start(cls, folder: Path, stage: str, settings: dict[str, Any], tracking: Tracking, mode: str) -> _Wandb:
        """Open (or continue) the folder's run; offline where online fails."""
        try:
            return cls(_init_wandb(folder, stage, settings, tracking, mode))
        except Exception as error:  # wandb's own errors have no common base, and none may end a training
            if mode == "offline":
                say(f"wandb: going on without it ({_first_line(error)})")
                return cls(None)
            say(f"wandb: recording offline, as the server is not reached ({_first_line(error)})")
        os.environ["WANDB_MODE"] = "offline"  # so that the stages after this one do not wait in vain too
        _stop_wandb()  # its service holds the run's id until it ends
        return cls.start(folder, stage, settings, tracking, "offline")

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self._run is not None

    def do(self, action: Callable[[Any], object]) -> None:
        """Run `action` on the wandb run, if there is one that works."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # as above
            say(f"wandb: going on without it ({_first_line(error)})")
            self._run = None


def wandb_mode(tracking: Tracking) -> Mode:
    """What `auto` means here: WANDB_MODE where it is set, else online where a key is found, else offline.

    Raises ConfigError where online is asked for without a key: wandb would wait at a prompt.
    """
    asked = tracking.wandb
    if asked == "auto":
        asked = _MODES.get(os.environ.get("WANDB_MODE", "").lower(), "auto")
    if asked == "offline" or asked == "off":
        return asked
    if _has_wandb_key():
        return "online"
    if asked == "online":
        raise ConfigError(
            "tracking.wandb is 'online', but no API key is found: run `wandb login`, set WANDB_API_KEY, or choose "
            "--tracking.wandb offline"
        )
    _say_once("wandb: no API key found, so runs are recorded offline (`wandb sync` sends them later)")
    return "offline"


def resolved(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values, as YAML and JSON write them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _init_wandb(folder: Path, stage: str, settings: dict[str, Any], tracking: Tracking, mode: str) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    id_file = folder / WANDB_ID
    if not id_file.is_file():
        id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    run = wandb.init(
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        reinit="create_new",  # a run that the user has open in a notebook stays theirs
        mode=mode,  # pyright: ignore[reportArgumentType]
        dir=folder,
        project=tracking.project,
        group=tracking.group,
        job_type=stage,
        name=tracking.name or "-".join(filter(None, (tracking.group, stage))),
        config=json.loads(without_passwords(json.dumps(settings))),
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            init_timeout=30,
            finish_timeout=120,
            finish_timeout_raises=False,
        ),
    )
    # our own `step` is the x-axis: wandb's counter refuses to go back, which is what a resume from a checkpoint does
    for axis in AXES:
        run.define_metric(axis)
    run.define_metric("*", step_metric="episode" if stage == "ppo" else "step")
    return run


def _stop_wandb() -> None:
    import wandb

    wandb.teardown()


def _wandb_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _wandb_reference(kind: str, source: str) -> Any:
    """An artifact by address; where files are, its version is their content, else its name (a hub id, a function)."""
    import wandb

    path = Path(source)
    name = "-".join(path.resolve().with_suffix("").parts[-3:]) if path.exists() else source
    artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", name).strip("-"), type=kind, metadata={"source": source})
    address = path.resolve().as_uri() if path.exists() else f"source:{quote(source)}"
    artifact.add_reference(address, name=path.name, checksum=path.exists())
    return artifact


def _log_artifact(run: Any, artifact: Any, *, used: bool) -> None:
    """As a result of the run, or as something it used.

    Offline, `use_artifact` refuses; the record that it makes of a draft, which `wandb sync` sends, is made here.
    """
    if not used:
        run.log_artifact(artifact)
    elif run.settings.mode == "offline":
        run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _rankings_of(source: str) -> str:
    """The exported rankings beside a label store, whose own file changes whenever it is looked at."""
    exported = Path(source).parent / "label" / "rankings.jsonl"
    return str(exported) if exported.is_file() and Path(source).suffix == ".db" else source


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc(file).authenticators(host):
                return True
        except (OSError, NetrcParseError):
            continue
    return False


@cache
def _say_once(text: str) -> None:
    say(text)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _to_yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)

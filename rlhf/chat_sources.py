"""Which policies, reward and prompts `rlhf chat` is about: what its config names, and what the run's folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import ChatConfig, PPOConfig
from rlhf.run_folder import CONFIG
from rlhf.types import ConfigError

LOG = "chat.jsonl"


@dataclass(frozen=True)
class Found:
    """Sources, ready to load."""

    policies: tuple[tuple[str, str], ...]
    """(name, source) of the baseline and the policy, or of one policy."""
    reward: str | None = None
    prompts: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    held_out: float = 0.0
    """Share of the prompts that no stage of the run has trained on; 0 takes all."""
    prompts_are_asked_for: bool = False
    """Rather than found in the run's settings."""
    log: Path | None = None


def find(config: ChatConfig) -> Found:
    """Where everything lies. Raises ConfigError where there is no policy, or no such run."""
    run = _folder(config.run)
    if run is None and not config.policy:
        raise ConfigError(
            "neither a run nor a policy is given: pass --run runs/NAME, or --policy and, to compare, --baseline"
        )
    settings = _settings(run, "sample") | _settings(run, "ppo")
    policy = config.policy or _model(run, "ppo")
    baseline = config.baseline or _model(run, "sft") or (settings.get("model") if policy else None)
    if policy is None:
        policy, baseline = config.baseline or _model(run, "sft"), None
    if policy is None:
        raise ConfigError(
            f"{run} holds no policy yet, neither ppo/model nor sft/model: finish `rlhf run` or `rlhf sft` first, or "
            "name one with --policy"
        )
    output = Path(config.output) if config.output else run
    return Found(
        policies=_named(baseline, policy),
        reward=config.reward or _reward(run, settings),
        prompts=config.prompts or settings.get("prompts"),
        columns=config.columns if config.prompts else settings.get("columns") or {},
        held_out=0.0 if config.prompts else settings.get("held_out", PPOConfig().held_out),
        prompts_are_asked_for=config.prompts is not None,
        log=output / LOG if output else None,
    )


def _folder(run: str | None) -> Path | None:
    if run is None:
        return None
    if not Path(run).is_dir():
        raise ConfigError(f"run is {run!r}, which is no folder: give the folder of a run, such as runs/default")
    return Path(run)


def _model(run: Path | None, stage: str) -> str | None:
    """The model that a stage of the run has finished."""
    folder = run / stage / "model" if run else None
    return str(folder) if folder and folder.is_dir() else None


def _settings(run: Path | None, stage: str) -> dict[str, Any]:
    """The settings that a stage of the run wrote down; none where it has not begun."""
    path = run / stage / CONFIG if run else None
    if path is None or not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else {}


def _reward(run: Path | None, settings: Mapping[str, Any]) -> str | None:
    """The function that PPO was run against, or the run's reward model, or one that lies elsewhere, if any."""
    named = settings.get("reward")
    if named and ":" in named and not Path(named).exists():
        return named
    return _model(run, "reward") or (named if named and Path(named).is_dir() else None)


def _named(baseline: str | None, policy: str) -> tuple[tuple[str, str], ...]:
    """(name, source) in the order in which they are shown; names are short, and differ."""
    if baseline is None:
        return ((_name(policy), policy),)
    names = _name(baseline), _name(policy)
    if names[0] == names[1]:
        names = f"{names[0]} (baseline)", f"{names[1]} (policy)"
    return ((names[0], baseline), (names[1], policy))


def _name(source: str) -> str:
    """`PPO` of runs/mine/ppo/model, `SmolLM2` of a hub id or folder."""
    parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "model")]
    last = parts[-1] if parts else source
    return last.upper() if last in ("sft", "ppo") else last

"""The command line: parses, then imports only the stage it runs.

`rlhf STAGE --config file.yaml --key value` fills the stage's frozen dataclass; YAML first, flags on top. What the user
can mend ends in one message on stderr and exit status 2, an interrupt in status 130; anything else is a bug and keeps
its traceback. Parsing imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.types import ConfigError, UserError

STAGES = {
    "sft": ("SFTConfig", "rlhf.sft", "fine-tune a model on demonstrations"),
    "sample": ("SampleConfig", "rlhf.sample", "write K completions per prompt into the label store"),
    "label": ("LabelConfig", "labeling_ui.stage", "open the page on which people rank them (or simulate annotators)"),
    "reward": ("RewardConfig", "reward_models.stage", "train a reward model on the rankings"),
    "ppo": ("PPOConfig", "rlhf.ppo", "optimise the policy against the reward"),
    "evaluate": ("EvaluateConfig", "rlhf.evaluation", "compare two policies on held-out prompts"),
}
"""Command -> (config class in rlhf.config, module whose `run(config)` does the work, what it does)."""

USAGE = """\
usage: rlhf COMMAND [--config FILE.yaml] [--key value ...]

From human rankings to an aligned language model.

{stages}
  run       all of them from one YAML; what is done and unchanged is skipped
  report    write report.html of a run folder

`rlhf COMMAND --help` lists the settings of a command, `--print_config` prints them as YAML.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    sys.path.insert(0, os.getcwd())  # so that `module:function` finds the user's own files
    try:
        _command(arguments[0])(arguments[1:])
    except UserError as error:
        print(f"rlhf {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped. To go on from the last checkpoint, repeat: rlhf {' '.join(arguments)}", file=sys.stderr)
        return 130
    return 0


def _usage() -> str:
    return USAGE.format(stages="\n".join(f"  {name:9} {what}" for name, (_, _, what) in STAGES.items())).rstrip()


def _command(name: str) -> Callable[[list[str]], None]:
    """The function behind a command; raises ConfigError naming the nearest one."""
    if name in STAGES:
        return lambda arguments: _stage(name, arguments)
    commands = {"run": _run, "report": _report}
    if name in commands:
        return commands[name]
    from rlhf.settings import nearest

    hint = nearest(name, [*STAGES, *commands]) or "."
    raise ConfigError(f"there is no command `{name}`{hint} `rlhf --help` lists them all")


def _stage(name: str, arguments: list[str]) -> None:
    from importlib import import_module

    from rlhf import config, settings

    config_class, module, _ = STAGES[name]
    parsed, _ = settings.parse(getattr(config, config_class), arguments, command=name)
    import_module(module).run(parsed)


def _run(arguments: list[str]) -> None:
    from rlhf import settings
    from rlhf.config import STAGES as ORDER
    from rlhf.config import RunConfig

    choices = {
        "from": (ORDER, "start at this stage and run it and all after it again, changed or not"),
        "to": (ORDER, "stop after this stage"),
        "only": (ORDER, "run this stage only, changed or not"),
    }
    config, chosen = settings.parse(RunConfig, arguments, command="run", choices=choices)
    from rlhf import pipeline

    pipeline.run(config, start=chosen["from"], stop=chosen["to"], only=chosen["only"])


def _report(arguments: list[str]) -> None:
    usage = "usage: rlhf report RUN_FOLDER    writes RUN_FOLDER/report.html"
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"one run folder is needed\n{usage}")
    from rlhf import report

    folder = Path(arguments[0])
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the folder of a run, such as runs/default")
    print(report.render(folder))

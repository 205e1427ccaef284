"""The command line: parses, then imports only the stage it runs.

`rlhf STAGE --config file.yaml --key value` fills the stage's frozen dataclass; YAML first, flags on top. What the user
can mend ends in one message on stderr and exit status 2, Ctrl-C in status 130 and SIGTERM in 143; anything else is a
bug and keeps its traceback. Parsing imports neither torch nor anything else that is heavy.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.progress import is_main_process
from rlhf.stopping import no_interrupt_lost
from rlhf.types import ConfigError, RewardFn, UserError

STAGES: dict[str, tuple[type, str]] = {
    "sft": (config.SFTConfig, "fine-tune a model on demonstrations"),
    "sample": (config.SampleConfig, "write K completions per prompt into the label store"),
    "label": (config.LabelConfig, "open the page on which people rank them (or simulate annotators)"),
    "reward": (config.RewardConfig, "train a reward model on the rankings"),
    "ppo": (config.PPOConfig, "optimise the policy against the reward"),
    "evaluate": (config.EvaluateConfig, "compare two policies on held-out prompts"),
}

USAGE = """\
usage: rlhf COMMAND [--config FILE.yaml] [--key value ...]

From human rankings to an aligned language model.

{stages}
  run       all of them from one YAML; what is done and unchanged is skipped
  report    write report.html of a run folder
  chat      open a page that shows the answers of the SFT and the PPO policy side by side
  check     whether the invariants of PPO hold on your own model, tokenizer, template and reward
  accounts  who may log in to the page of `rlhf label --accounts true`: invite, list, pause ...
  data      back up, restore, verify, export and import a label store; erase a person from it

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
        with no_interrupt_lost():
            return _command(arguments[0])(arguments[1:]) or 0
    except UserError as error:
        process = "" if is_main_process() else f" (process {os.environ['RANK']})"
        print(f"rlhf {arguments[0]}{process}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from rlhf.run_folder import disk_fault

        fault = disk_fault(error)
        if fault is None:
            raise
        print(f"rlhf {arguments[0]}: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if is_main_process():
            asked_only = any(argument.startswith("--estimate") for argument in arguments)
            way = "" if asked_only else f" To go on from the last checkpoint: rlhf {_resuming(arguments)}"
            print(f"\nStopped.{way}", file=sys.stderr)
        return getattr(stop, "status", 130)  # of rlhf.stopping.Stopped: 143 after SIGTERM


def _resuming(arguments: Sequence[str]) -> str:
    """The command line that goes on: without `--from` and `--only`, which would start their stage anew."""
    kept: list[str] = []
    forced = ("--from", "--only")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before not in forced and argument not in forced and not argument.startswith(("--from=", "--only=")):
            kept.append(argument)
    return shlex.join(kept)


def _usage() -> str:
    return USAGE.format(stages="\n".join(f"  {name:9} {what}" for name, (_, what) in STAGES.items())).rstrip()


def _command(name: str) -> Callable[[list[str]], int | None]:
    """The function behind a command, which may return an exit status; raises ConfigError naming the nearest one."""
    if name == "ppo":
        return _ppo
    if name in STAGES:
        return lambda arguments: _stage(name, arguments)
    commands = {"run": _run, "report": _report, "chat": _chat, "check": _check, "accounts": _accounts, "data": _data}
    if name in commands:
        return commands[name]
    from rlhf.settings import nearest

    hint = nearest(name, [*STAGES, *commands]) or "."
    raise ConfigError(f"there is no command `{name}`{hint} `rlhf --help` lists them all")


def _stage(name: str, arguments: list[str]) -> None:
    from rlhf import pipeline, settings

    for flag in ("--accounts", "--insecure_http") if name == "label" else ():
        arguments = _spelt_out(arguments, flag)
    parsed, _ = settings.parse(STAGES[name][0], arguments, command=name)
    pipeline.run_alone(name, parsed)


def _ppo(arguments: list[str]) -> None:
    from rlhf import pipeline, settings

    choices = {
        "estimate": (("true", "false"), "say what the run will take, from a probe of about 20 s, and do not run"),
        "json": (("true", "false"), "print the estimate as one JSON object"),
    }
    arguments = _spelt_out(_spelt_out(arguments, "--estimate"), "--json")
    parsed, chosen = settings.parse(config.PPOConfig, arguments, command="ppo", choices=choices)
    if chosen["estimate"] == "true":
        _estimate(parsed, as_json=chosen["json"] == "true")
    elif chosen["json"] == "true":
        raise ConfigError("--json is the form of an estimate: give --estimate, too")
    else:
        pipeline.run_alone("ppo", parsed)


def _estimate(parsed: config.PPOConfig, *, as_json: bool) -> None:
    from functools import partial

    from rlhf import pipeline
    from rlhf.memory import keep_freed_memory
    from rlhf.progress import quiet

    quiet()
    keep_freed_memory()
    from rlhf import estimate

    with redirect_stdout(sys.stderr):  # what a reward of the user's own prints is no part of the answer
        found = estimate.run(parsed, load_reward=partial(pipeline.load_reward, precision=parsed.precision))
    _print(found, as_json=as_json)


def _print(report: Any, *, as_json: bool) -> None:
    """To standard output: one JSON object, or as wide as the terminal is."""
    if as_json:
        print(report.to_json())
        return
    from rich.console import Console

    report.print(Console(highlight=False, width=None if sys.stdout.isatty() else 160))


def _run(arguments: list[str]) -> None:
    from rlhf import pipeline, settings

    choices = {
        "from": (config.STAGES, "start at this stage and run it and all after it again, changed or not"),
        "to": (config.STAGES, "stop after this stage"),
        "only": (config.STAGES, "run this stage only, changed or not"),
    }
    parsed, chosen = settings.parse(config.RunConfig, arguments, command="run", choices=choices)
    pipeline.run(parsed, start=chosen["from"], stop=chosen["to"], only=chosen["only"])


def _report(arguments: list[str]) -> None:
    usage = "usage: rlhf report RUN_FOLDER    writes RUN_FOLDER/report.html"
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"one run folder is needed\n{usage}")
    folder = Path(arguments[0])
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the folder of a run, such as runs/default")
    from rlhf import report

    print(report.render(folder))


def _chat(arguments: list[str]) -> None:
    from functools import partial

    from rlhf import pipeline, settings

    parsed, _ = settings.parse(config.ChatConfig, arguments, command="chat")
    from rlhf.progress import quiet

    quiet()
    from rlhf import chat_page

    chat_page.run(parsed, load_reward=partial(pipeline.load_reward, precision=parsed.precision))


def _accounts(arguments: list[str]) -> None:
    from labeling_ui import accounts_command

    accounts_command.main(arguments)


def _data(arguments: list[str]) -> int:
    """Exit status 1 where a store does not verify, or rows were left out."""
    from rlhf import data_command

    return data_command.main(arguments)


def _check(arguments: list[str]) -> int:
    """Exit status 1 where an invariant does not hold."""
    from rlhf import settings

    parsed, _ = settings.parse(config.CheckConfig, _spelt_out(arguments, "--json"), command="check")
    from rlhf.memory import keep_freed_memory
    from rlhf.progress import quiet

    quiet()
    keep_freed_memory()
    from rlhf import check

    with redirect_stdout(sys.stderr):  # what a reward of the user's own prints is no part of the answer
        report = check.run(parsed, load_reward=_reward_as_it_is)
    _print(report, as_json=parsed.json)
    return 0 if report.passed else 1


def _spelt_out(arguments: Sequence[str], flag: str) -> list[str]:
    """`--flag` alone as `--flag=true`."""
    following = [*arguments[1:], ""]
    return [
        f"{flag}=true" if argument == flag and after not in ("true", "false") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _reward_as_it_is(source: str) -> RewardFn:
    """A reward whose text contract nobody has looked at yet; a model computes in fp32."""
    if ":" in source and not Path(source).exists():
        from rlhf.data import resolve

        return resolve(source)
    from reward_models.model import RewardModel

    return RewardModel.load(source, precision="fp32")

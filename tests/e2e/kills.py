"""Kills: SIGKILL at a random moment of each stage, then the same command, until it ends as if nothing had happened.

`python -m tests.e2e.kills --times 10 --seed 0` runs the tiny loop once unbroken. Then each stage is started in a folder
with the stages before it, killed at a random moment, and started again in the same folder, until it has been killed so
often; what it leaves must be what the unbroken run left. The same again with Ctrl-C. The stage `loop` is all of them in
one command. Exit status 1 says that something was different.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf.config import STAGES
from tests.e2e.run_content import differences, stamps_of_finished

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "experiments" / "sentiment" / "tiny.yaml"
RUN = Path("runs/tiny")
LOOP = "loop"
"""All stages in one command."""
OFTEN = (
    *("--sft.save_every", "3", "--reward.save_every", "1", "--ppo.save_every", "1"),
    *("--sample.batch_size", "12", "--reward.trainable", "{last_layers: 2}"),
)
"""A checkpoint after every few steps, and a trunk whose states lie in a file."""
GIVEN_UP_AFTER = 300.0
"""Seconds for one command."""
SOONER = 0.8
"""How much earlier, after a stage that was over before its moment: it may have been timed on a busier machine."""
SAID = "said.txt"
MEMORY = Path("/dev/shm")
"""Where the runs lie if it can be: what survives a killed process is in the system's memory anyway."""


@dataclass
class Trial:
    """What became of one stage."""

    stage: str
    kills: int = 0
    runs: int = 0
    """Folders in which it was killed: a stage that ends before its last kill is begun again in a new one."""
    interrupts: int = 0
    moments: list[float] = field(default_factory=list)
    """Of kills, then of Ctrl-C: seconds after the stage began, or went on."""
    seconds: float = 0.0
    """Of the unbroken stage."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Running:
    """A command in a process group of its own."""

    pid: int
    folder: Path

    def said(self) -> str:
        """Its standard error so far."""
        return (self.folder / SAID).read_text(encoding="utf-8", errors="replace")

    def ended(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs. Told once."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def until(self, reached: Callable[[], bool], limit: float = GIVEN_UP_AFTER) -> int | None:
        """Wait until something is so, or the command has ended (then its status is returned)."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            status = self.ended()
            if status is not None:
                return status
            if reached():
                return None
            time.sleep(0.003)
        return None

    def end(self) -> int:
        """Wait for it to end by itself; kills it where it does not."""
        status = self.until(lambda: False)
        return self.send(signal.SIGKILL) if status is None else status

    def send(self, signum: int) -> int:
        """Send a signal to the process group and wait for its end."""
        os.killpg(self.pid, signum)
        return self.end() if signum != signal.SIGKILL else os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def begun(self, stage: str) -> bool:
        """Whether the stage has begun, or gone on."""
        if stage == LOOP:
            return "sft: " in self.said()
        return f"{stage}: running" in self.said()


@dataclass(frozen=True)
class Bench:
    """Where the runs lie, and how a command is started."""

    root: Path
    fork: bool
    """Commands run in forks of this process, which has imported everything: moments fall into work."""

    def command(self, stage: str) -> list[str]:
        """The arguments of `rlhf` for all stages up to this one. Paths are relative: folders can be exchanged."""
        given = ["run", "--config", str(CONFIG), "--runs", "runs", "--sft.model", str(self.root / "model")]
        return [*given, *OFTEN, *([] if stage == LOOP else ["--to", stage])]

    def start(self, folder: Path, arguments: Sequence[str]) -> Running:
        """Start a command in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAID).write_bytes(b"")
        pid = os.fork()
        if pid == 0:
            _become(folder, list(arguments), fork=self.fork)
        return Running(pid, folder)

    def fresh(self, stage: str, name: str) -> Path:
        """A folder with what the unbroken run had when the stage began."""
        folder = self.root / f"{stage}-{name}"
        before = STAGES[: 0 if stage == LOOP else STAGES.index(stage)]
        if before:
            shutil.copytree(self.left_by(before[-1]), folder / RUN)
        return folder

    def left_by(self, stage: str) -> Path:
        """What the unbroken run was when the stage had ended."""
        return self.root / f"after-{STAGES[-1] if stage == LOOP else stage}"


def _become(folder: Path, arguments: list[str], *, fork: bool) -> None:
    """In a new process: be the command. Does not return."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        said = os.open(SAID, os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
        if not fork:
            os.execve(
                sys.executable, [sys.executable, "-m", "rlhf", *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
            )
        from rlhf import cli

        random.seed()
        status = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def unbroken(bench: Bench) -> dict[str, float]:
    """Run the loop undisturbed, and keep what each stage leaves; returns the seconds of each."""
    folder = bench.root / "unbroken"
    seconds: dict[str, float] = {}
    for stage in STAGES:
        running = bench.start(folder, bench.command(stage))
        if running.end() != 0:
            raise SystemExit(f"the unbroken run failed:\n{running.said()}")
        shutil.copytree(folder / RUN, bench.left_by(stage))
        started, done = ((folder / RUN / stage / name).stat().st_mtime for name in ("started.json", "done.json"))
        seconds[stage] = done - started
    return seconds | {LOOP: sum(seconds.values())}


def kill(bench: Bench, trial: Trial, times: int, chance: random.Random) -> None:
    """Kill the stage `times` times; where it comes to its end before that, look at it and begin again."""
    span = trial.seconds
    while trial.kills < times and trial.runs < 3 * times + 6:
        trial.runs += 1
        folder = bench.fresh(trial.stage, f"killed-{trial.runs}")
        while trial.kills < times:
            before = stamps_of_finished(folder / RUN)
            running = bench.start(folder, bench.command(trial.stage))
            moment = chance.uniform(0, span)
            if not _reach(running, trial, moment):
                span *= SOONER
                break
            running.send(signal.SIGKILL)
            if not _is_done(folder, trial.stage):
                trial.kills += 1
                trial.moments.append(round(moment, 3))
            _not_again(trial, folder, before)
        _look(bench, trial, folder, bench.command(trial.stage))


def interrupt(bench: Bench, trial: Trial, times: int, chance: random.Random) -> None:
    """Press Ctrl-C at a random moment, and go on as the last line says."""
    span = trial.seconds
    for number in range(3 * times + 6):
        if trial.interrupts == times:
            return
        folder, go_on = bench.fresh(trial.stage, f"interrupted-{number}"), bench.command(trial.stage)
        running = bench.start(folder, go_on)
        moment = chance.uniform(0, span)
        if not _reach(running, trial, moment):
            span *= SOONER
        else:
            in_time = not _is_done(folder, trial.stage)
            status, said = running.send(signal.SIGINT), running.said()
            if in_time or status != 0:
                trial.interrupts += 1
                trial.moments.append(round(moment, 3))
                trial.problems += [f"Ctrl-C after {moment:.3f} s: {what}" for what in _impolite(status, said)]
                go_on = shlex.split(said.partition("\nStopped. To go on from the last checkpoint: rlhf ")[2]) or go_on
        _look(bench, trial, folder, go_on)


def _reach(running: Running, trial: Trial, moment: float) -> bool:
    """Wait for the moment; False where the command ended by itself before it."""
    status = running.until(lambda: running.begun(trial.stage))
    if status is None:
        status = running.until(lambda: False, limit=moment)
    if status:
        trial.problems.append(f"status {status} of {running.folder.name}:\n{running.said()[-3000:]}")
    return status is None


def _is_done(folder: Path, stage: str) -> bool:
    return (folder / RUN / (STAGES[-1] if stage == LOOP else stage) / "done.json").is_file()


def _impolite(status: int, said: str) -> Iterator[str]:
    """What a command did after Ctrl-C that it should not."""
    last = said.splitlines()[-1] if said.strip() else ""
    if status not in (130, -signal.SIGINT):  # which a shell calls 130 too: Python's end if the signal fell into `exec`
        yield f"status {status}, not 130"
    if not last.startswith("Stopped. To go on"):
        yield f"the last line is {last!r}"
    for word in ("Traceback", "Exception ignored"):
        if word in said:
            yield f"{word}: {said[said.index(word) :][:3000]}"


def _not_again(trial: Trial, folder: Path, before: dict[str, dict[str, int]]) -> None:
    """Note each stage that was done before, and has been touched."""
    after = stamps_of_finished(folder / RUN)
    trial.problems += [f"{name} was done again" for name, stamps in before.items() if after.get(name) != stamps]


def _look(bench: Bench, trial: Trial, folder: Path, go_on: Sequence[str]) -> None:
    """Let the command finish; compare with the unbroken run; remove the folder."""
    before = stamps_of_finished(folder / RUN)
    running = bench.start(folder, go_on)
    if running.end() != 0:
        trial.problems.append(f"{folder.name} does not go on:\n{running.said()[-3000:]}")
        return
    _not_again(trial, folder, before)
    found = differences(folder / RUN, bench.left_by(trial.stage))
    trial.problems += [f"{folder.name}: {each}" for each in found]
    if not found:
        shutil.rmtree(folder)


def attempt(bench: Bench, stage: str, times: int, seconds: float, seed: int) -> Trial:
    """Kill and interrupt one stage."""
    trial, chance = Trial(stage, seconds=round(seconds, 1)), random.Random(f"{seed} {stage}")
    for what in (kill, interrupt):
        what(bench, trial, times, chance)
    for done, name in ((trial.kills, "kills"), (trial.interrupts, "times Ctrl-C")):
        if done < times:
            trial.problems.append(f"only {done} {name}: the stage was over too soon")
    return trial


def table(trials: Sequence[Trial]) -> str:
    """As the README shows it."""
    lines = ["| stage | seconds | kills | Ctrl-C | moments, seconds after the stage began or went on | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for each in trials:
        moments = " ".join(f"{moment:.1f}" for moment in each.moments)
        verdict = "the same" if not each.problems else f"{len(each.problems)} problems"
        row = (each.stage, f"{each.seconds:.1f}", each.kills, each.interrupts, moments, verdict)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def preload() -> None:
    """Import what the stages import, once for all forks."""
    import datasets  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    import rlhf.pipeline
    from rlhf.progress import quiet

    quiet()
    torch.set_num_threads(1)
    for module in rlhf.pipeline.MODULES.values():
        importlib.import_module(module)
    importlib.import_module("experiments.sentiment.data").prompts()  # is kept


def make_model(folder: Path) -> None:
    """The tiny random model, in another process: a fork of one that has computed with several threads would hang."""
    code = "import sys; from tests.conftest import *; make_model_folder(Path(sys.argv[1]), make_tokenizer())"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill and interrupt every stage of the tiny loop.")
    parser.add_argument("--times", type=int, default=10, help="kills of each stage, and as many times Ctrl-C")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stages", nargs="+", default=[*STAGES, LOOP], choices=[*STAGES, LOOP])
    parser.add_argument("--fork", action="store_true", help="import once: faster, and moments fall into the work")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    chosen = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order: the same to the bit
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    bench = Bench(root, chosen.fork)
    make_model(root / "model")
    if chosen.fork:
        preload()
    seconds = unbroken(bench)
    trials = []
    for stage in chosen.stages:
        trials.append(attempt(bench, stage, chosen.times, seconds[stage], chosen.seed))
        print(f"{stage}: {'; '.join(trials[-1].problems) or 'the same'}", file=sys.stderr, flush=True)
    print(json.dumps([asdict(each) for each in trials], indent=2) if chosen.json else table(trials))
    if any(each.problems for each in trials):
        print(f"what was left lies in {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())

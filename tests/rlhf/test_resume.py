"""N steps equal k, a kill, N - k: to the bit on a CPU, in metrics, weights, moments, samples. And stopping cleanly."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import checkpoint, cli, pipeline
from rlhf.stopping import Stopped, stop_request
from rlhf.types import UserError
from tests.conftest import ROOT, make_model_folder
from tests.rlhf import broken_runs
from tests.rlhf import ppo_world as world

KILLED = [*broken_runs.CASES, "full@writing"]
STOPPED = {"full@SIGTERM": 143, "head@SIGINT": 130}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Folders of runs that were broken off, all in one other process."""
    folder = tmp_path_factory.mktemp("broken")
    make_model_folder(folder / "model", tiny_tokenizer, layers=2)
    cases = [*KILLED, *STOPPED, "full@twice", "sft@full", "sft@lora"]
    command = [sys.executable, "-m", "tests.rlhf.broken_runs", str(folder), *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "ends.json").write_text(done.stdout.splitlines()[-1])
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    return folder


def how_it_ended(root: Path, case: str) -> int:
    return json.loads((root / "ends.json").read_text())[case]


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Any:
    """`unbroken("lora")`: the folder of the same run that nobody disturbed."""

    def folder(name: str) -> Path:
        path = root / f"{name}.unbroken"
        if not path.is_dir():
            broken_runs.train(name, root, path)
        return path

    return folder


def assert_same_run(one: Path, other: Path) -> None:
    assert world.records(one) == world.records(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    for pattern in ("model/*.safetensors", "value/*.safetensors"):
        files = sorted(path.relative_to(one) for path in one.glob(pattern))
        assert files == sorted(path.relative_to(other) for path in other.glob(pattern))
        for file in files:
            ours, theirs = load_file(one / file), load_file(other / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    ours, theirs = (checkpoint.latest(folder / "checkpoints") for folder in (one, other))
    assert ours
    assert theirs
    assert ours.numbers() == theirs.numbers()
    manifests = [json.loads((saved.path / "manifest.json").read_text()) for saved in (ours, theirs)]
    weights = [{name: sha for name, sha in m.items() if name.startswith("weights/")} for m in manifests]
    assert weights[0] == weights[1]
    assert flat(ours.states()) == flat(theirs.states())


def flat(value: Any) -> Any:
    """Nested states with tensors as lists, so that == compares them."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: flat(inner) for key, inner in value.items()}
    return [flat(inner) for inner in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("case", KILLED)
def test_a_killed_run_ends_as_if_it_had_never_stopped(case: str, root: Path, unbroken: Any) -> None:
    name, _, how = case.partition("@")
    assert how_it_ended(root, case) == -signal.SIGKILL
    folder = root / case
    assert not (folder / "model").exists()
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    assert saved.step == 2
    assert [record["step"] for record in world.records(folder)] == ([1, 2, 3, 4] if how else [1, 2, 3])
    broken_runs.train(name, root, folder)
    assert_same_run(folder, unbroken(name))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000005"]


def test_an_interrupted_run_ends_as_if_it_had_never_stopped(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The same in one process and a moment, for the bugs that `tests.mutations` plants."""
    make_model_folder(tmp_path / "model", tiny_tokenizer, layers=2)

    def crash() -> None:
        raise RuntimeError("the power failed")

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with pytest.raises(UserError, match="the power failed"):
        broken_runs.train("full", tmp_path, broken, broken_runs.at_rollout(3, crash))
    torch.manual_seed(99)
    for folder in (broken, whole):
        broken_runs.train("full", tmp_path, folder)
    assert_same_run(broken, whole)


def test_what_a_checkpoint_holds_for_each_technique(root: Path, unbroken: Any) -> None:
    """The KL coefficient has moved, the average and the critic are there, and only trained weights are written."""
    for name, options in broken_runs.CASES.items():
        saved = checkpoint.latest(unbroken(name) / "checkpoints")
        assert saved is not None
        numbers = saved.numbers()
        assert (numbers["kl_coef"] != 0.05) == ("kl_target" in options), name
        assert set(numbers["running"]) == {"start", "alarmed"}
        average = saved.path / "weights" / "ema.safetensors"
        assert average.exists() == ("ema_decay" in options.get("extras", {})), name
        trained = saved.weights("policy")
        assert all(("lora_" in weight) == (name == "lora") for weight in trained)
        assert set(saved.states()) == {"optimizer", "schedule", "random"}
        values = saved.weights("value")
        assert (len(values) == 0) == (name == "rloo")
        assert (len(values) > 2) == (name == "lora")


def test_the_average_is_what_the_run_leaves(unbroken: Any) -> None:
    saved = checkpoint.latest(unbroken("full") / "checkpoints")
    assert saved is not None
    average, last = saved.weights("ema"), saved.weights("policy")
    written = load_file(unbroken("full") / "model" / "model.safetensors")
    shared = [name for name in average if name in written]
    assert shared
    for name in shared:
        assert torch.equal(average[name], written[name])
    assert any(not torch.equal(last[name], written[name]) for name in shared)


def test_a_run_that_is_done_can_be_called_again(root: Path, unbroken: Any) -> None:
    folder = unbroken("head")
    before = (folder / "metrics.jsonl").read_bytes()
    result = broken_runs.train("head", root, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert result.metrics == checkpoint.latest(folder / "checkpoints").numbers()["metrics"]  # type: ignore[union-attr]


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_killed_fine_tuning_ends_as_if_it_had_never_stopped(trainable: str, root: Path) -> None:
    """In its fifth step, by which the trainer's checkpoint of the fourth was there; dropout is on."""
    folder, unbroken = root / f"sft@{trainable}", root / f"sft.{trainable}.unbroken"
    assert how_it_ended(root, f"sft@{trainable}") == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoints/checkpoint-*")] == ["checkpoint-4"]
    assert not (folder / "model").exists()
    broken_runs.fine_tune(trainable, root, folder)
    broken_runs.fine_tune(trainable, root, unbroken)
    assert [record["step"] for record in world.records(folder)] == [1, 2, 3, 4, 5, 6, 6]
    assert world.records(folder) == world.records(unbroken)
    assert (folder / "samples.jsonl").read_bytes() == (unbroken / "samples.jsonl").read_bytes()
    (file,) = (folder / "model").glob("*.safetensors")
    ours, theirs = load_file(file), load_file(unbroken / "model" / file.name)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_fine_tuning_killed_after_its_last_step_takes_none_more(trainable: str, root: Path, tmp_path: Path) -> None:
    """As when it is killed while it is measured."""
    first = broken_runs.fine_tune(trainable, root, tmp_path)
    before = world.records(tmp_path)
    trained = {name: weight.clone() for name, weight in first.policy.state_dict().items()}
    shutil.rmtree(first.model_folder)
    again = broken_runs.fine_tune(trainable, root, tmp_path)
    assert world.records(tmp_path) == before
    assert all(torch.equal(weight, trained[name]) for name, weight in again.policy.state_dict().items())
    assert [path.name for path in tmp_path.glob("checkpoints/checkpoint-*")] == ["checkpoint-4"]


# ---------------------------------------------------------------- stopping cleanly


@pytest.mark.parametrize("case", STOPPED)
def test_a_run_that_is_asked_to_stop_finishes_its_step_saves_and_goes_on_later(
    case: str, root: Path, unbroken: Any
) -> None:
    assert how_it_ended(root, case) == STOPPED[case]
    folder, name = root / case, case.partition("@")[0]
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None
    assert saved.step == 3, "the step under way is finished and saved, though none was due"
    assert json.loads((folder / "env.json").read_text())["status"] == "interrupted"
    said = (root / "said.txt").read_text()
    assert "step 3 of 5 is saved: run it again to go on" in said
    assert "stopping after this step; once more to stop at once" in said
    broken_runs.train(name, root, folder)
    assert_same_run(folder, unbroken(name))


def test_asked_twice_it_stops_at_once(root: Path) -> None:
    assert how_it_ended(root, "full@twice") == 130
    saved = checkpoint.latest(root / "full@twice" / "checkpoints")
    assert saved is not None
    assert saved.step == 2


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with suppress(Stopped), stop_request() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        assert stop.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[0], "a second one does what it always did"
    with stop_request() as stop:
        pass
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_request_that_no_step_looked_at_stops_at_the_end() -> None:
    """As while the model is written after the last step: the next stage must not begin."""
    with pytest.raises(Stopped) as stopped, stop_request():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.status == 143


def test_what_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_noted_and_nothing_breaks() -> None:
    noted: list[bool] = []

    def work() -> None:
        with stop_request() as stop:
            noted.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [False]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_says_how_to_go_on(
    signum: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(*_: Any, **__: Any) -> None:
        raise Stopped("step 3 of 5 is saved: run it again to go on", signum)

    monkeypatch.setattr(pipeline, "run_stage", stage)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["ppo", "--seed", "3"]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "Stopped. To go on from the last checkpoint: rlhf ppo --seed 3"

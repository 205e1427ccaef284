"""What users get wrong, through the real command line: one message that says what, where and how to mend it.

Every case is a command that works, with one fault added. It must end with status 2 and at most three lines, without a
traceback and without anything half-written; and the same command without the fault must then work in the same folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf import cli
from rlhf.run_folder import append_record, open_to_append, read_records
from tests.conftest import CHAT_TEMPLATE, ROOT, make_tokenizer
from tests.e2e import bad_input, bad_settings
from tests.e2e.bad_input import COMMANDS, FUNCTIONS, PROMPTS, RANKING, cut, lines
from tests.rlhf import tiny

CASES = bad_input.CASES | bad_settings.CASES


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A folder with everything that the commands need."""
    from rlhf import models
    from rlhf.store import Store
    from rlhf.types import Completion

    folder = tmp_path_factory.mktemp("good")
    (folder / "mine.py").write_text(FUNCTIONS)
    (folder / "prompts.jsonl").write_text(lines(*({"prompt": prompt} for prompt in PROMPTS)))
    (folder / "demos.jsonl").write_text(lines(*({"prompt": prompt, "completion": " good ."} for prompt in PROMPTS)))
    (folder / "rankings.jsonl").write_text(lines(*(RANKING | {"prompt": prompt} for prompt in PROMPTS)))
    store = Store(folder / "labels.db")
    for prompt in PROMPTS:
        store.add_completions(prompt, [Completion(text, "m", 0) for text in (" good", " bad", prompt)])
    store.close()
    shutil.copytree(tiny_model_folder, folder / "model")
    chat = make_tokenizer(CHAT_TEMPLATE)
    tiny.save(models.load_policy(str(tiny_model_folder), chat), chat, folder / "trained")
    shutil.copytree(tiny_model_folder, folder / "bytes")
    tiny.tokenizer(pad="<pad>").save_pretrained(folder / "bytes")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, in which the command runs."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "broken", "failing"):
        sys.modules.pop(name, None)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("ppo", "--kl_coef -1")` runs a command that must be refused, and returns what it says."""

    def run(command: str, flags: str = "") -> str:
        capsys.readouterr()
        assert cli.main([*COMMANDS[command].split(), *flags.split()]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        message = said.rpartition(f"rlhf {command}: ")[2]
        assert 1 <= len(message.strip().splitlines()) <= 3, message
        return message

    return run


def works(command: str) -> None:
    assert cli.main(COMMANDS[command].split()) == 0


def half_written(folder: Path) -> list[str]:
    """What a failed run must not leave behind."""
    left = [str(path) for path in folder.rglob("*") if path.suffix in (".writing", ".new") or path.name == "model"]
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            left.append(f"{path} is torn")
    for path in folder.rglob("*.jsonl"):
        content = path.read_text(encoding="utf-8")
        if len(read_records(path)) != content.count("\n") or (content and not content.endswith("\n")):
            left.append(f"{path} is torn")
    return left


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_named_with_its_remedy(name: str, good: Path, folder: Path, refused: Callable[..., str]) -> None:
    case = CASES[name]
    for file, content in case.files.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    case.change(folder)
    message = refused(case.command, case.flags)
    assert all(part in message for part in case.says), message
    assert half_written(folder / "run") == []
    for file in case.files:
        if (good / file).exists():
            shutil.copy(good / file, folder / file)
    works(case.command)


def test_bad_rankings_among_good_ones_are_told_by_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "rankings.jsonl").open("a") as file:
        file.write(lines(RANKING | {"ranks": [0, 1, 2]}) + "{broken\n")
    works("reward")
    said = capsys.readouterr().err
    assert "line 9 of rankings.jsonl: rank 0 is not an integer from 1 to 3" in said
    assert "line 10 of rankings.jsonl: not JSON" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ppo:\n  kl_coeff: 1\n", ("a.yaml, line 2", "`ppo.kl_coeff`", "did you mean `ppo.kl_coef`?")),
        ("label:\n  simulate: {utility: 'a:b', annotators: 0}\n", ("label.simulate.annotators is 0", "at least 1")),
        ("sft:\n  trainable: {lora_rank: 0}\n", ("sft.trainable.lora_rank is 0", "at least 1")),
        ("name: ..\n", ("name is '..'", "name of a folder")),
        ("ppo: 3\n", ("a.yaml, line 1", "`ppo` is '3'", "indented below")),
        ("sft: {data: demos.jsonl}\n", ("sample.prompts is not given", "--sample.prompts")),
    ],
)
def test_the_yaml_of_a_pipeline(
    text: str, says: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.yaml").write_text(text)
    assert cli.main(["run", "--config", "a.yaml"]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in says), message
    assert not (folder / "runs").exists()


# ---------------------------------------------------------------- two processes


def test_a_second_process_on_the_same_folder(folder: Path, refused: Callable[..., str]) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf.run_folder import held\n"
        "with held(Path('run'), otherwise=''): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, **pipes) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        for command in ("sft", "ppo", "evaluate"):
            message = refused(command)
            assert f"process {other.pid} is working in run: wait for it, or choose another --output" in message
        assert [path.name for path in (folder / "run").iterdir()] == [".lock"]
        other.communicate("")
    works("ppo")


# ---------------------------------------------------------------- a full disk


@contextmanager
def full_disk(folder: Path, room: int) -> Iterator[None]:
    """`folder` on a disk with `room` bytes left; where nothing can be mounted, no file may grow beyond that."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    try:
        (folder / "ballast").write_bytes(bytes(2**20 - room))
        yield
        (folder / "ballast").unlink()
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()
    kept.rename(folder)


@pytest.mark.parametrize(
    ("command", "flags", "room"),
    [
        ("sft", "--save_every 1", 200_000),
        ("sft", "", 32_000),
        ("sample", "", 24_000),
        ("reward", "--save_every 1 --epochs 3", 200_000),
        ("reward", "", 100_000),
        ("ppo", "", 300_000),
        ("ppo", "", 100_000),
        ("evaluate", "", 0),
    ],
)
def test_a_full_disk(command: str, flags: str, room: int, folder: Path, refused: Callable[..., str]) -> None:
    """Whatever the disk had no room for is not there at all, and with room the same command goes on."""
    with full_disk(folder / "run", room):
        message = refused(command, flags)
        assert "run" in message or "disk" in message
        assert "ake room on that disk and repeat the command" in message
        assert half_written(folder / "run") == []
    works(command)


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with open_to_append(path) as file:
            append_record(file, {"step": 1})
            with pytest.raises(OSError, match=r"File too large|No space left"):
                append_record(file, {"text": "a" * 200})
            append_record(file, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ---------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("ppo", "checkpoints/step_*/states.pt"),
        ("ppo", "checkpoints/step_*/weights/policy.safetensors"),
        ("ppo", "checkpoints/step_*/manifest.json"),
        ("sft", "checkpoints/checkpoint-*/model.safetensors"),
        ("sft", "checkpoints/checkpoint-*/trainer_state.json"),
    ],
)
def test_a_checkpoint_cut_in_half(command: str, file: str, folder: Path, refused: Callable[..., str]) -> None:
    works(command)
    shutil.rmtree(folder / "run" / "model")  # as if it had been interrupted before its end
    (damaged,) = (folder / "run").glob(file)
    cut(str(damaged.relative_to(folder)))(folder)
    message = refused(command)
    assert "run/checkpoints" in message
    assert "damaged" in message or "incomplete" in message
    assert "Delete run/checkpoints to start this stage again" in message
    assert half_written(folder / "run" / "model") == []
    shutil.rmtree(folder / "run" / "checkpoints")
    works(command)

"""The command line: what it prints, refuses and imports. Stages are replaced by fakes; none is run here."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf import cli, pipeline
from rlhf.config import LastLayers, Lora, PPOConfig, RunConfig, Simulation
from rlhf.types import DataError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that reached a stage; every stage is a fake that records."""
    seen: list[Any] = []
    for name, module in pipeline.MODULES.items():
        fake = ModuleType(module)
        fake.run = lambda config, **_: seen.append(config)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, fake)
        assert name in cli.STAGES
    monkeypatch.setattr(pipeline, "run", lambda config, **chosen: seen.append(SimpleNamespace(config=config, **chosen)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return seen


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message on stderr of a command that must fail with status 2."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_a_stage_gets_defaults_yaml_and_flags_in_this_order(calls: list[Any], tmp_path: Path) -> None:
    file = write(tmp_path / "ppo.yaml", "kl_coef: 1e-3\nbatch_size: 64\ntrainable: {last_layers: 4}\n")
    assert (
        cli.main(["ppo", "--config", file, "--batch_size", "96", "--extras.dual_clip=3", "--columns.prompt", "q"]) == 0
    )
    (config,) = calls
    assert isinstance(config, PPOConfig)
    assert (config.kl_coef, config.batch_size, config.lam) == (0.001, 96, 0.95)
    assert config.trainable == LastLayers(4)
    assert config.extras.dual_clip == 3
    assert config.columns == {"prompt": "q"}


def test_run_takes_nested_keys_and_the_stages_to_run(calls: list[Any], tmp_path: Path) -> None:
    file = write(
        tmp_path / "all.yaml", "name: film\nlabel:\n  simulate: {utility: 'a:b', annotators: 3}\nppo: {lam: 1.0}\n"
    )
    arguments = ["run", "--from", "reward", "--config", file, "--ppo.kl_coef", "0.1", "--to=ppo"]
    assert cli.main([*arguments, "--sft.trainable.lora_rank", "8"]) == 0
    (call,) = calls
    assert (call.start, call.stop, call.only) == ("reward", "ppo", None)
    assert isinstance(call.config, RunConfig)
    assert (call.config.name, call.config.ppo.lam, call.config.ppo.kl_coef) == ("film", 1.0, 0.1)
    assert call.config.label.simulate == Simulation(utility="a:b", annotators=3)
    assert call.config.sft.trainable == Lora(lora_rank=8)


@pytest.mark.parametrize("command", ["ppo", "run"])
def test_print_config_is_a_config(
    command: str, calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flag = "--kl_coef" if command == "ppo" else "--ppo.kl_coef"
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, flag, "0.125", "--print_config"])
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "kl_coef: 0.125" in printed
    assert cli.main([command, "--config", write(tmp_path / "printed.yaml", printed)]) == 0
    direct = PPOConfig(kl_coef=0.125)
    assert calls == [direct] if command == "ppo" else calls[0].config == RunConfig(ppo=direct)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pp"], "did you mean `ppo`?"),
        (["ppo", "--kl_cof", "1"], "there is no flag --kl_cof: did you mean --kl_coef?"),
        (["ppo", "--kl_co", "1"], "did you mean --kl_coef?"),  # no abbreviations
        (["run", "--kl_coef", "1"], "did you mean --ppo.kl_coef?"),
        (["run", "--ppo.extras.dualclip", "3"], "did you mean --ppo.extras.dual_clip?"),
        (["run", "--form", "ppo"], "did you mean --from?"),
        (["run", "--from", "pp"], "invalid choice: 'pp'"),
        (["ppo", "--kl_coef", "much"], "kl_coef is 'much', but it must be NUMBER"),
        (["sft", "--trainable", "some"], "trainable is 'some', but it must be {full,lora,head}|"),
        (["ppo", "--kl_coef", "-1"], "kl_coef is -1.0, but it must be 0 or more"),
        (["run", "--ppo.kl_coef", "-1"], "ppo.kl_coef is -1.0, but it must be 0 or more"),
        (["run", "--ppo.extras.dual_clip", "0.5"], "ppo.extras.dual_clip is 0.5, but it must be above 1"),
        (
            ["label", "--simulate.utility", "vader"],
            "simulate.utility is 'vader', but it must be written as module:function",
        ),
        (["ppo", "--kl_coef"], "--kl_coef"),
        (["ppo", "stray"], "stray"),
        (["ppo", "--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read"),
        (["report"], "one run folder is needed"),
        (["chat", "--polcy", "x"], "did you mean --policy?"),
        (["chat", "--port", "65536"], "port is 65536, but it must be 0 to 65535"),
        (["chat", "--max_completion_tokens", "0"], "max_completion_tokens is 0, but it must be above 0"),
        (["report", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_refusals_name_what_is_wrong_and_what_is_near(
    arguments: list[str], message: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *arguments)
    assert calls == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nppo:\n  kl_coeff: 1\n",
            "bad.yaml, line 3: there is no setting `ppo.kl_coeff`: did you mean `ppo.kl_coef`?",
        ),
        ("ppo:\n  kl_coef: 1\n  kl_coef: 2\n", "bad.yaml, line 3: `ppo.kl_coef` is set a second time"),
        ("ppo:\n  kl_coef: much\n", "ppo.kl_coef is 'much', but it must be NUMBER"),
        ("ppo: [\n", "bad.yaml, line 2, is not valid YAML"),
        ("- ppo\n", "bad.yaml holds no settings"),
        ("ppo:\n  kl_coef: -1\n", "ppo.kl_coef is -1"),
    ],
)
def test_yaml_faults_name_file_and_line(
    text: str, message: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "run", "--config", write(tmp_path / "bad.yaml", text))
    assert calls == []


def test_the_yaml_of_a_pipeline_is_recognised_where_one_stage_was_asked_for(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "all.yaml", "name: x\nppo: {kl_coef: 1}\n")
    assert "rlhf run --config ... --only STAGE" in refusal(capsys, "ppo", "--config", file)


def test_a_fault_of_the_user_is_one_message_and_a_bug_keeps_its_traceback(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> Any:
        def run(config: Any, **_: Any) -> None:
            raise error

        return run

    monkeypatch.setattr(sys.modules["rlhf.sft"], "run", fail(DataError("reviews.jsonl:3: the prompt is empty")))
    assert refusal(capsys, "sft") == "rlhf sft: reviews.jsonl:3: the prompt is empty\n"
    monkeypatch.setattr(sys.modules["rlhf.sft"], "run", fail(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["sft"])


def test_an_interrupt_says_how_to_go_on_without_starting_again(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert cli.main(["run", "--name", "x y", "--from", "ppo", "--only=sft"]) == 130
    assert capsys.readouterr().err.strip() == "Stopped. To go on from the last checkpoint: rlhf run --name 'x y'"


def test_an_interrupt_inside_a_callback_of_the_garbage_collector_is_not_lost(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python prints and forgets what is raised there."""
    reached: list[str] = []
    # a shell lets what it starts in the background ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*_: Any, **__: Any) -> None:
        thing: set[int] = set()
        watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        reached.append("after the callback")
        time.sleep(20)
        assert watched

    monkeypatch.setattr(pipeline, "run", interrupted)
    hook = sys.unraisablehook
    try:
        assert cli.main(["run"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached, "Python raised it at once"
    assert sys.unraisablehook is hook
    assert "Traceback" not in capsys.readouterr().err


def test_another_error_inside_such_a_callback_is_reported_as_ever(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(lost.exc_type))

    def failing(*_: Any, **__: Any) -> None:
        thing: set[int] = set()
        watched = weakref.ref(thing, lambda _: {}["no such key"])
        del thing
        assert watched() is None

    monkeypatch.setattr(pipeline, "run", failing)
    assert cli.main(["run"]) == 0
    assert reported == [KeyError]


def test_help_tells_every_setting_its_meaning_and_default(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["ppo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model TEXT The SFT policy: start and reference." in text
    assert (
        "--missing_eos_penalty NUMBER Taken from the score of a completion that did not end by itself. (default: 1.0)"
        in text
    )
    assert "--schedule {linear,constant} (default: linear)" in text
    assert "SUPPRESS" not in text
    assert text.count("(default: 0.95)") == 1


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in [*pipeline.MODULES, "run", "report", "chat", "check"])


HEAVY = (
    "torch",
    "transformers",
    "trl",
    "gradio",
    "wandb",
    "datasets",
    "pandas",
    "numpy",
    "scipy",
    "sqlalchemy",
    "matplotlib",
)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ppo", "--help"], ["run", "--help"], ["chat", "--help"], ["ppo", "--kl_cof", "1"]]
)
def test_parsing_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rlhf import cli\n"
        "try: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_users_own_modules_are_found(tmp_path: Path) -> None:
    write(tmp_path / "mine.py", "def rows():\n    return [{'prompt': 'a'}]\n")
    code = "import sys; sys.path.pop(0); from rlhf import cli; cli.main(['pp']); import mine; print(mine.rows())"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    )
    assert done.stdout == "[{'prompt': 'a'}]\n"


def test_every_default_config_survives_yaml() -> None:
    from rlhf import settings

    plain = yaml.safe_load(yaml.safe_dump({"ppo": {"trainable": {"last_layers": 2}}, "label": {"simulate": None}}))
    assert settings.build(RunConfig, plain).ppo.trainable == LastLayers(2)

"""The run folder and the wandb run, read back from their files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlhf import tracking as module
from rlhf.config import LastLayers, PPOConfig, PPOExtras, SampleConfig, SFTConfig, Tracking
from rlhf.environment import without_passwords
from rlhf.tracking import Tracker, resolved, wandb_mode
from rlhf.types import ConfigError
from tests.rlhf import wandb_reader

OFF = Tracking(wandb="off")
OFFLINE = Tracking(wandb="offline", group="demo")


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    names = (
        "RANK",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_SILENT",
        "NETRC",
    )
    for name in names:
        monkeypatch.delenv(name, raising=False)
    module._say_once.cache_clear()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tracker(folder: Path, tracking: Tracking = OFF, resume_step: int | None = None) -> Tracker:
    return Tracker(folder, stage="ppo", config=PPOConfig(), tracking=tracking, resume_step=resume_step)


def test_metrics_are_sorted_plain_and_never_nan(tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        run.log({"b": np.float32(0.5), "a": np.int64(3), "c": math.nan, "d": -math.inf, "e": True}, step=7)
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == '{"step": 7, "a": 3, "b": 0.5, "c": null, "d": null, "e": 1}\n'


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        run.log({"a": 1.0}, step=1)
        assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_same_numbers_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with tracker(tmp_path / name) as run:
            for step in range(3):
                run.log({"objective/kl": step / 3}, step=step)
                run.alert("kl", "large")
            run.table("samples", ["prompt"], [["x"]], step=2)
    for file in ("metrics.jsonl", "samples.jsonl", "alerts.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        PPOConfig(learning_rate=1e-5, trainable=LastLayers(4), extras=PPOExtras(dual_clip=3.0)),
        SampleConfig(prompts="módulo:函数", columns={"prompt": "no", "completion": "1.0"}),
    ],
)
def test_config_survives_yaml(tmp_path: Path, config: Any) -> None:
    with Tracker(tmp_path, stage="x", config=config, tracking=OFF):
        pass
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == resolved(config)


def test_environment_names_versions_without_importing_them(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf.config import PPOConfig, Tracking; "
        "from rlhf.tracking import Tracker\n"
        f"folder, config = Path({str(tmp_path)!r}), PPOConfig(seed=3, tracking=Tracking(wandb='off'))\n"
        "with Tracker(folder, stage='ppo', config=config, tracking=config.tracking): pass\n"
        "print({'torch', 'transformers', 'trl', 'wandb', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    found = json.loads((tmp_path / "env.json").read_text(encoding="utf-8"))
    import torch  # the oracle: what the package itself says

    assert found["packages"]["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["seed"] == 3
    assert found["stage"] == "ppo"
    assert found["status"] == "finished"


def test_status_while_running(tmp_path: Path) -> None:
    with tracker(tmp_path):
        assert json.loads((tmp_path / "env.json").read_text(encoding="utf-8"))["status"] == "running"


def test_status_tells_how_it_ended(tmp_path: Path) -> None:
    for error, status in ((ValueError, "failed"), (KeyboardInterrupt, "interrupted")):
        with pytest.raises(error), tracker(tmp_path):
            raise error
        assert json.loads((tmp_path / "env.json").read_text(encoding="utf-8"))["status"] == status


def test_passwords_are_struck_out() -> None:
    text = without_passwords("rlhf label --store postgresql+psycopg://ann:s3cr:et@db:5432/labels --port 7860")
    assert text == "rlhf label --store postgresql+psycopg://ann:***@db:5432/labels --port 7860"
    assert (
        without_passwords("http://127.0.0.1:7860/a@b and module:function")
        == "http://127.0.0.1:7860/a@b and module:function"
    )


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        for step in range(1, 6):
            run.log({"a": step}, step=step)
            run.table("samples", ["text"], [[f"at {step}"]], step=step)
            run.alert("a", "b")
        run.summary({"best": 1, "kept": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a"')  # the crash tore this line
    with tracker(tmp_path, resume_step=3) as run:
        run.log({"a": 40}, step=4)
        run.summary({"best": 3})
    assert [(row["step"], row["a"]) for row in lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [row["text"] for row in lines(tmp_path / "samples.jsonl")] == ["at 1", "at 2", "at 3"]
    assert [row["step"] for row in lines(tmp_path / "alerts.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"best": 3, "kept": 2}


def test_a_torn_line_within_the_kept_steps_goes_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2')
    with tracker(tmp_path, resume_step=2) as run:
        run.log({"a": 2}, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'


def test_a_fresh_start_replaces_the_old_record(tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        run.log({"a": 1}, step=1)
        run.alert("old", "news")
    with tracker(tmp_path) as run:
        run.log({"a": 2}, step=1)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}]
    assert not (tmp_path / "alerts.jsonl").exists()


def test_samples_survive_any_text(tmp_path: Path) -> None:
    hostile = "line\nbreak \u2028 {{7*7}} <script>\ud800 😀"
    with tracker(tmp_path) as run:
        run.table(
            "samples", ["prompt", "score"], [[[{"role": "user", "content": "hi"}], math.nan], [hostile, 1]], step=1
        )
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").open(encoding="utf-8")]
    assert json.loads(rows[0]["prompt"]) == [{"role": "user", "content": "hi"}]
    assert rows[0]["score"] is None
    assert rows[1]["prompt"] == hostile.replace("\ud800", "?")


def test_alert_reaches_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path) as run:
        run.log({"a": 1}, step=12)
        run.alert("kl", "twice the budget", level="error")
    assert capsys.readouterr().err == "ppo: ERROR: kl: twice the budget\n"
    assert lines(tmp_path / "alerts.jsonl") == [
        {"step": 12, "level": "error", "title": "kl", "text": "twice the budget"}
    ]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    folder = tmp_path / "run"
    with tracker(folder, OFFLINE) as run:
        run.log({"a": 1}, step=1)
        run.table("t", ["a"], [[1]], step=1)
        run.alert("a", "b")
        run.summary({"a": 1})
        run.artifact("model", folder)
    assert not folder.exists()


def test_auto_is_offline_without_a_key_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_mode(Tracking()) == "offline"
    assert wandb_mode(Tracking()) == "offline"
    assert capsys.readouterr().err.count("\n") == 1


def test_auto_is_online_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine example.org login user password x\n")
    netrc.chmod(0o600)
    assert wandb_mode(Tracking()) == "offline"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(Tracking()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080")  # a key for another server is no key
    assert wandb_mode(Tracking()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode(Tracking()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(Tracking()) == "off"
    assert wandb_mode(Tracking(wandb="offline")) == "offline"  # what the config says wins


def test_online_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--tracking\.wandb offline"):
        wandb_mode(Tracking(wandb="online"))


def test_offline_run_holds_curves_table_and_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scores = [step / 10 for step in range(400)]  # enough to cross the blocks of the file
    with tracker(tmp_path, OFFLINE) as run:
        for step, score in enumerate(scores):
            run.log({"objective/scores": score, "loss/policy_avg": -score, "episode": 8 * step}, step=step)
        run.table("samples", ["prompt", "score"], [["<b>hi", 0.5], ["x", None]], step=9)
        run.alert("kl", "twice the budget")
        run.summary({"win_rate": 0.61})
        run.artifact("model", tmp_path / "model")
    assert capfd.readouterr().err.splitlines() == ["ppo: WARN: kl: twice the budget"]  # wandb itself is silent

    (file,) = wandb_reader.run_files(tmp_path)
    history = wandb_reader.history(file)
    curve = [row for row in history if "objective/scores" in row]
    assert [row["objective/scores"] for row in curve] == scores
    assert [row["step"] for row in curve] == list(range(400))
    assert [row["episode"] for row in curve] == list(range(0, 3200, 8))
    assert wandb_reader.tables(file) == [{"columns": ["prompt", "score"], "data": [["<b>hi", 0.5], ["x", None]]}]
    by_kind = {record.WhichOneof("record_type"): record for record in wandb_reader.records(file)}
    assert by_kind["alert"].alert.title == "kl"
    assert by_kind["run"].run.run_group == "demo"
    assert by_kind["run"].run.job_type == "ppo"
    assert by_kind["run"].run.run_id == (tmp_path / "wandb_id").read_text().strip()
    settings = {item.key: json.loads(item.value_json) for item in by_kind["run"].run.config.update}
    assert settings["kl_coef"] == 0.05
    metrics = [r.metric for r in wandb_reader.records(file) if r.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "episode" for metric in metrics)
    assert {"step", "episode", "tokens"} <= {metric.name for metric in metrics}


def test_stages_are_linked_by_the_content_of_what_they_made_and_used(tmp_path: Path) -> None:
    """The artifact that one run logs and the one that another says it used are the same version: name and digest."""
    made = tmp_path / "demo" / "sft"
    (made / "model").mkdir(parents=True)

    def versions(content: str) -> list[Any]:
        (made / "model" / "model.safetensors").write_text(content)
        for stage, folder, config in (
            ("sft", made, SFTConfig(data="some.module:rows")),
            ("ppo", tmp_path / "demo" / "ppo", PPOConfig(model=str(made / "model"))),
        ):
            with Tracker(folder, stage=stage, config=config, tracking=OFFLINE):
                pass
        folders = (made, tmp_path / "demo" / "ppo")
        files = [max(wandb_reader.run_files(folder), key=lambda file: file.stat().st_mtime_ns) for folder in folders]
        return [
            record.artifact
            for file in files
            for record in wandb_reader.records(file)
            if record.WhichOneof("record_type") == "artifact"
        ]

    first = versions("one")
    makers = [each for each in first if not each.use_after_commit]
    used = {each.name: each for each in first if each.use_after_commit}
    (model,) = makers
    assert model.name == "demo-sft-model"
    assert used["demo-sft-model"].digest == model.digest
    assert "some.module-rows" in used  # what sft read
    (again,) = [each for each in versions("two") if not each.use_after_commit]
    assert again.digest != model.digest  # trained again: another version in the same place


def test_resume_goes_on_with_the_same_wandb_run(tmp_path: Path) -> None:
    with tracker(tmp_path, OFFLINE) as run:
        run.log({"a": 1}, step=1)
    first = (tmp_path / "wandb_id").read_text()
    with tracker(tmp_path, OFFLINE, resume_step=1) as run:
        run.log({"a": 2}, step=2)
    assert (tmp_path / "wandb_id").read_text() == first
    files = wandb_reader.run_files(tmp_path)
    assert {file.name for file in files} == {f"run-{first.strip()}.wandb"}
    assert [row["a"] for file in files for row in wandb_reader.history(file)] == [1, 2]


def test_a_failing_wandb_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, values: dict[str, float]) -> None:
            raise RuntimeError("the disk is full\nand more")

    monkeypatch.setattr(module, "_init_wandb", lambda *_: Broken())
    with tracker(tmp_path, OFFLINE) as run:
        for step in range(3):
            run.log({"a": step}, step=step)
    assert capsys.readouterr().err == "wandb: going on without it (the disk is full)\n"
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_an_online_run_that_cannot_start_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_MODE", "online")
    asked = []

    def unreachable(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        raise TimeoutError("no answer")

    monkeypatch.setattr(module, "_init_wandb", unreachable)
    monkeypatch.setattr(module, "_stop_wandb", lambda: asked.append("stop"))
    with tracker(tmp_path, Tracking()) as run:
        run.log({"a": 1}, step=1)
    assert asked == ["online", "stop", "offline"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert wandb_mode(Tracking()) == "offline"  # the stages after this one do not wait again


def test_no_process_outlives_the_training(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from rlhf.config import PPOConfig, Tracking; "
        "from rlhf.tracking import Tracker\n"
        f"folder, config = Path({str(tmp_path)!r}), PPOConfig(tracking=Tracking(wandb='offline'))\n"
        "with Tracker(folder, stage='ppo', config=config, tracking=config.tracking) as t:\n"
        "    t.log({'a': 1}, step=1)\n"
        "print(os.getpid())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left = subprocess.run(["pgrep", "-f", f"wandb-core.*--pid {done.stdout.strip()}"], capture_output=True, check=False)
    assert left.stdout == b""
    assert done.stderr == ""

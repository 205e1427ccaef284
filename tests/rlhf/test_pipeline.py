"""The pipeline around fake stages: what each is given, what is skipped, resumed or done again, and the lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf import pipeline
from rlhf.config import STAGES, LabelConfig, PPOConfig, RunConfig, SampleConfig, SFTConfig, Simulation, Tracking
from rlhf.fingerprint import content
from rlhf.renewal import SIMULATED
from rlhf.report_data import ReportData, Table, write_report_data
from rlhf.store import Store
from rlhf.types import Completion, ConfigError, Ranking

ROOT = Path(__file__).parents[2]
A, B = Completion("a", "m", 0), Completion("b", "m", 0)


class Stages:
    """Fakes that write what the next stage reads, and record who ran with what."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.configs: dict[str, Any] = {}
        self.failing: str | None = None

    def fake(self, name: str) -> Callable[..., None]:
        def run(config: Any, **given: Any) -> None:
            assert list(given) == (["load_reward"] if name in ("ppo", "evaluate") else [])
            self.ran.append(name)
            self.configs[name] = config
            folder = Path(config.output)
            if self.failing == name:
                (folder / "checkpoint").write_text("half")
                raise KeyboardInterrupt
            (folder / "model").mkdir(exist_ok=True)
            if name == "sample":
                Store(config.store).add_completions("p", [A, B])
            if name == "label":
                rank(config.store, "simulated-1")

        return run

    def take(self) -> list[str]:
        """Who ran since the last call."""
        ran, self.ran = self.ran, []
        return ran


def rank(store: str, annotator: str, ranks: tuple[int, int] = (1, 2)) -> None:
    Store(store).import_rankings([Ranking("p", ("a", "b"), ranks, annotator)])


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stages:
    fakes = Stages()
    monkeypatch.chdir(tmp_path)
    for name, module in pipeline.MODULES.items():
        made = ModuleType(module)
        made.run = fakes.fake(name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module, made)
    report = ModuleType("rlhf.report")
    report.render = lambda folder: folder / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf.report", report)
    return fakes


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for name in ("sft.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_text(f'{{"prompt": "{name}"}}\n')
    return RunConfig(
        name="film",
        runs=str(tmp_path / "runs"),
        sft=SFTConfig(data=str(tmp_path / "sft.jsonl")),
        sample=SampleConfig(prompts=str(tmp_path / "prompts.jsonl")),
        label=LabelConfig(simulate=Simulation(utility="mine:taste")),
    )


def test_each_stage_takes_what_the_ones_before_it_made(config: RunConfig) -> None:
    made = pipeline.resolve(
        replace(config, seed=7, tracking=Tracking(wandb="off"), sft=replace(config.sft, held_out=0.25))
    )
    folder = f"{config.runs}/film"
    assert list(made) == list(STAGES)
    assert [stage.output for stage in made.values()] == [f"{folder}/{name}" for name in STAGES]
    assert {stage.tracking for stage in made.values()} == {Tracking(wandb="off", group="film")}
    assert {stage.seed for stage in made.values()} == {7}
    assert made["label"].simulate.seed == 7
    assert {stage.held_out for stage in made.values() if hasattr(stage, "held_out")} == {0.25}
    assert made["sample"].model == made["reward"].model == made["ppo"].model == f"{folder}/sft/model"
    assert made["sample"].store == made["label"].store == made["reward"].rankings == f"{folder}/labels.db"
    assert made["ppo"].reward == made["evaluate"].reward == f"{folder}/reward/model"
    assert (made["evaluate"].policy, made["evaluate"].baseline) == (f"{folder}/ppo/model", f"{folder}/sft/model")
    assert made["ppo"].prompts == made["evaluate"].prompts == config.sample.prompts


def test_without_demonstrations_everything_starts_from_the_model_as_it_is(
    config: RunConfig, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, sft=SFTConfig(model="some/model"))
    pipeline.run(config)
    assert stages.ran == list(STAGES[1:])
    assert {stages.configs[name].model for name in ("sample", "reward", "ppo")} == {"some/model"}
    assert stages.configs["evaluate"].baseline == "some/model"
    assert "no sft.data: everything starts from some/model as it is" in capsys.readouterr().err
    for asked in ({"start": "sft"}, {"only": "sft"}):
        with pytest.raises(ConfigError, match=r"sft\.data"):
            pipeline.run(config, **asked)


def test_limits_of_length_hold_for_the_stages_after(config: RunConfig) -> None:
    config = replace(
        config,
        sft=replace(config.sft, max_prompt_tokens=24, max_completion_tokens=32),
        sample=replace(config.sample, max_completion_tokens=40),
        ppo=PPOConfig(max_prompt_tokens=20),
    )
    made = pipeline.resolve(config)
    limits = {
        name: (made[name].max_prompt_tokens, made[name].max_completion_tokens) for name in made if name != "label"
    }
    assert limits == {"sft": (24, 32), "sample": (24, 40), "reward": (24, 40), "ppo": (20, 40), "evaluate": (24, 40)}
    alone = pipeline.resolve(replace(config, sft=replace(config.sft, data=None)))
    assert alone["sample"].max_prompt_tokens == SampleConfig().max_prompt_tokens, "there is no SFT to follow"


def test_what_a_stage_sets_itself_stays(config: RunConfig) -> None:
    ppo = PPOConfig(model="elsewhere", reward="mine:reward", prompts="other.jsonl", output="out", seed=3)
    columns = {"prompt": "question"}
    made = pipeline.resolve(replace(config, seed=7, ppo=ppo, sample=replace(config.sample, columns=columns)))
    assert (made["ppo"].model, made["ppo"].reward, made["ppo"].output, made["ppo"].seed) == (
        "elsewhere",
        "mine:reward",
        "out",
        3,
    )
    assert (made["ppo"].prompts, made["ppo"].columns) == ("other.jsonl", {})  # columns belong to the data they name
    assert (made["evaluate"].prompts, made["evaluate"].columns) == (config.sample.prompts, columns)
    assert (made["evaluate"].policy, made["evaluate"].baseline) == ("out/model", "elsewhere")
    assert made["evaluate"].reward == "mine:reward"


def test_stages_may_not_disagree_about_the_split(config: RunConfig) -> None:
    torn = replace(config, sft=replace(config.sft, held_out=0.2), ppo=PPOConfig(held_out=0.3))
    with pytest.raises(ConfigError, match=r"sft\.held_out 0\.2.*ppo\.held_out 0\.3"):
        pipeline.resolve(torn)


def test_what_no_stage_can_fill_is_asked_for_before_anything_runs(config: RunConfig, stages: Stages) -> None:
    without = replace(config, sample=replace(config.sample, prompts=None))
    with pytest.raises(ConfigError, match=r"sample\.prompts is not given: pass --sample\.prompts"):
        pipeline.run(without)
    assert stages.take() == []


def test_a_second_run_skips_what_has_not_changed(
    config: RunConfig, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    report = pipeline.run(config)
    assert stages.take() == list(STAGES)
    assert report == Path(config.runs) / "film" / "report.html"
    assert str(report) in capsys.readouterr().out
    pipeline.run(replace(config, tracking=Tracking(project="elsewhere")))  # where numbers are shown changes none
    assert stages.take() == []


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda c: replace(c, ppo=PPOConfig(kl_coef=0.2)), ["ppo", "evaluate"]),
        (lambda c: replace(c, evaluate=replace(c.evaluate, best_of_n=8)), ["evaluate"]),
        (lambda c: replace(c, sft=replace(c.sft, epochs=2)), list(STAGES)),
        (lambda c: replace(c, label=replace(c.label, simulate=Simulation("mine:other"))), ["label"]),
    ],
)
def test_a_changed_setting_runs_its_stage_and_what_reads_it(
    change: Callable[[RunConfig], RunConfig], again: list[str], config: RunConfig, stages: Stages
) -> None:
    pipeline.run(config)
    stages.take()
    pipeline.run(change(config))  # the last case: other annotators, who said the same
    assert stages.take() == again


def test_changed_data_runs_what_reads_it(config: RunConfig, stages: Stages, tmp_path: Path) -> None:
    pipeline.run(config)
    stages.take()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    pipeline.run(config)
    assert stages.take() == [
        "sample",
        "label",
        "ppo",
        "evaluate",
    ]  # the rankings came out the same, so reward did not run


def test_new_rankings_count_but_a_touched_database_does_not(config: RunConfig, stages: Stages) -> None:
    pipeline.run(config)
    stages.take()
    store = f"{config.runs}/film/labels.db"
    os.utime(store, (1, 1))
    Store(store).add_completions("q", [A, B])  # unranked: the file differs, the rankings do not
    pipeline.run(config)
    assert stages.take() == []
    rank(store, "me", (2, 1))
    pipeline.run(config)
    assert stages.take() == ["reward", "ppo", "evaluate"]


def test_an_interrupted_stage_goes_on_in_its_folder(
    config: RunConfig, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.failing = "ppo"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config)
    stages.take()
    stages.failing = None
    pipeline.run(config)
    assert stages.take() == ["ppo", "evaluate"]
    assert (Path(config.runs) / "film/ppo/checkpoint").read_text() == "half"
    assert "where it was interrupted" in capsys.readouterr().err


def test_checkpoints_of_other_settings_are_not_resumed_but_kept(
    config: RunConfig, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.failing = "ppo"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config)
    stages.failing = None
    pipeline.run(replace(config, ppo=PPOConfig(kl_coef=0.2)))
    folder = Path(config.runs) / "film"
    assert not (folder / "ppo/checkpoint").exists()
    assert (folder / "previous/ppo/checkpoint").read_text() == "half"
    assert "previous/ppo" in capsys.readouterr().err


def test_a_folder_that_is_not_a_stages_is_left_alone(config: RunConfig, stages: Stages, tmp_path: Path) -> None:
    thesis = tmp_path / "home" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ConfigError, match=r"choose another --sft\.output"):
        pipeline.run(replace(config, sft=replace(config.sft, output=str(thesis.parent))))
    assert thesis.read_text() == "years of work"
    assert stages.take() == []


def test_samples_of_changed_settings_replace_the_old_but_people_stay(config: RunConfig, stages: Stages) -> None:
    pipeline.run(config)
    with closing(Store(f"{config.runs}/film/labels.db")) as store:
        store.add_completions("only a person saw this", [A, B])
        store.import_rankings([Ranking("only a person saw this", ("a", "b"), (2, 1), "me")])
        store.add_completions("nobody saw this", [A, B])
        store.add_completions("of another round", [A, B], 1)
        stages.take()
        pipeline.run(replace(config, label=replace(config.label, overlap=2)), stop="label")
        assert stages.take() == ["label"]
        assert {str(item.prompt) for item in store.items(0)} == {"p", "only a person saw this", "nobody saw this"}
        pipeline.run(replace(config, sft=replace(config.sft, epochs=2)), stop="sample")
        assert {str(item.prompt) for item in store.items()} == {"p", "only a person saw this", "of another round"}
        assert [ranking.annotator for ranking in store.rankings()] == ["me"]


def test_simulated_annotators_say_it_again_when_their_settings_change(config: RunConfig, stages: Stages) -> None:
    pipeline.run(config)
    store = f"{config.runs}/film/labels.db"
    rank(store, "me", (2, 1))
    pipeline.run(replace(config, label=replace(config.label, simulate=Simulation("mine:other"))), stop="label")
    with closing(Store(store)) as after:
        assert [(ranking.annotator, ranking.ranks) for ranking in after.rankings()] == [
            ("me", (2, 1)),
            ("simulated-1", (1, 2)),
        ]
        assert after.counts().items == 1


def test_simulated_annotators_are_known_by_their_names() -> None:
    from labeling_ui.simulate import annotators

    assert all(each.name.startswith(SIMULATED) for each in annotators(Simulation("a:b", annotators=12)))


def test_from_to_and_only(config: RunConfig, stages: Stages) -> None:
    pipeline.run(config, stop="sample")
    assert stages.take() == ["sft", "sample"]
    pipeline.run(config)
    assert stages.take() == ["label", "reward", "ppo", "evaluate"]
    pipeline.run(config, start="ppo")
    assert stages.take() == ["ppo", "evaluate"]
    pipeline.run(config, only="reward")
    assert stages.take() == ["reward"]
    pipeline.run(config)  # what was done again counts as new for those after it
    assert stages.take() == ["ppo", "evaluate"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"start": "pp"}, "there is no stage 'pp'"),
        ({"start": "ppo", "stop": "sft"}, "there is nothing from ppo to sft"),
        ({"only": "ppo", "start": "sft"}, "leave out from and to"),
    ],
)
def test_stages_that_cannot_be_chosen(chosen: dict[str, str], message: str, config: RunConfig, stages: Stages) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.run(config, **chosen)
    assert stages.take() == []


def test_a_lost_result_is_made_again(config: RunConfig, stages: Stages) -> None:
    pipeline.run(config)
    stages.take()
    (Path(config.runs) / "film/reward/model").rmdir()
    pipeline.run(config, stop="reward")
    assert stages.take() == ["reward"]


def test_people_are_waited_for(config: RunConfig, stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = replace(config, label=LabelConfig())
    assert pipeline.run(by_hand) is None
    assert stages.take() == ["sft", "sample"]
    store = f"{config.runs}/film/labels.db"
    said = capsys.readouterr().err
    assert "1 of 1 items wait for a person's ranking" in said
    assert f"rlhf label --store {store}" in said
    rank(store, "me")
    assert pipeline.run(by_hand) is not None
    assert stages.take() == ["reward", "ppo", "evaluate"]


def test_with_the_rankings_there_are(config: RunConfig, stages: Stages) -> None:
    by_hand = replace(config, label=LabelConfig())
    pipeline.run(by_hand)
    stages.take()
    assert pipeline.run(by_hand, start="reward") is not None
    assert stages.take() == ["reward", "ppo", "evaluate"]


def test_the_evaluations_tables_and_verdict_are_printed(
    config: RunConfig, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("Policies", ("policy", "score"), (("[ppo]", 0.51239), ("sft", None)))
    evaluated = Path(pipeline.resolve(config)["evaluate"].output)
    pipeline.run(config)
    write_report_data(evaluated, ReportData("Evaluation", verdict="PPO wins 60 % (55 to 65).", tables=(table,)))
    capsys.readouterr()
    pipeline.run(config)
    shown = capsys.readouterr().out
    assert all(
        part in shown for part in ("Policies", "[ppo]", "0.512", "None", "PPO wins 60 % (55 to 65).", "report.html")
    )
    pipeline.run(config, only="sft")  # the old comparison says nothing about what was just done
    assert "Policies" not in capsys.readouterr().out


def test_a_second_process_is_refused(config: RunConfig, stages: Stages) -> None:
    folder = Path(config.runs) / "film"
    folder.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from rlhf.run_folder import held\n"
        "with held(Path(sys.argv[1]), otherwise=''): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"process {other.pid} is working in .*film: wait for it"):
            pipeline.run(config)
        assert stages.take() == []
        other.communicate("")
    pipeline.run(config)  # and the lock does not outlive its holder
    assert stages.take() == list(STAGES)


def test_content_follows_what_stands_behind_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file, folder, module = tmp_path / "a.jsonl", tmp_path / "data", tmp_path / "my_rows.py"
    folder.mkdir()
    for path in (file, folder / "part", module):
        path.write_text("1")
    names = [str(file), str(folder), "my_rows:rows"]
    before = [content(name) for name in names]
    assert [content(name) for name in names] == before
    for path in (file, folder / "part", module):
        path.write_text("22")
    assert all(old != new for old, new in zip(before, [content(name) for name in names], strict=True))
    assert content("owner/name") == "owner/name"
    assert content("no_such_module:rows") == "no_such_module:rows"
    assert content("embedded:smollm2-135m") == "embedded:smollm2-135m"


def test_done_marks_are_written_last(config: RunConfig, stages: Stages) -> None:
    pipeline.run(config, stop="sft")
    folder = Path(config.runs) / "film/sft"
    done, started = (json.loads((folder / name).read_text()) for name in ("done.json", "started.json"))
    assert done["fingerprint"] == started["fingerprint"]
    stages.failing = "sft"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(replace(config, sft=replace(config.sft, epochs=2)), stop="sft")
    assert not (folder / "done.json").exists()


def test_a_stage_killed_at_its_first_word_begins_again(config: RunConfig, stages: Stages) -> None:
    """A folder with nothing but what is left of writing `started.json` is no folder of somebody else's."""
    folder = Path(config.runs) / "film/sft"
    folder.mkdir(parents=True)
    (folder / "started.json.new").write_text('{"finger')
    pipeline.run(config, stop="sft")
    assert stages.take() == ["sft"]
    assert not (folder / "started.json.new").exists()

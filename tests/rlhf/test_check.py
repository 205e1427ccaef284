"""`rlhf check` passes on sound models of four families, and names the cause of each planted fault."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from reward_models.model import RewardModel
from rlhf import check, cli, models, update
from rlhf.actor_critic import ActorCritic
from rlhf.check_report import Finding, Report
from rlhf.check_subject import random_value_head
from rlhf.config import CheckConfig, LastLayers, Trainable
from rlhf.generation.native import NativeEngine
from rlhf.generation.plain import PlainEngine
from rlhf.sequences import Sequences
from rlhf.types import UserError
from tests.conftest import CHAT_TEMPLATE, make_tokenizer
from tests.rlhf import tiny

FP32 = CheckConfig(precision="fp32")


def no_reward(source: str) -> Any:
    raise AssertionError("no reward was given")


def run(folder: Path | str, trainable: Trainable | None = "head", **more: Any) -> Report:
    return check.run(
        CheckConfig(model=str(folder), trainable=trainable, precision="fp32", **more), load_reward=cli._reward_as_it_is
    )


def finding(report: Report, name: str, status: str) -> Finding:
    """The one finding of this check, which must have this status."""
    (found,) = {result.finding for result in report.results if result.check == name}
    assert found.status == status, found
    return found


def saved(name: str, folder: Path, tokenizer: Any, generation: dict[str, Any] | None = None) -> Path:
    """A tiny model whose own settings fit the tokenizer, and what is left in its generation config."""
    model = tiny.build(name, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id, **(generation or {})}))
    return folder


@pytest.fixture
def examined(policy: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Report]:
    """`examined("llama", "full")`: the report on a tiny policy in memory."""

    def examine(name: str, trainable: Trainable = "full", *, loaded: Any = None, **more: Any) -> Report:
        loaded = loaded if loaded is not None else policy(name, trainable)
        return check.examine(FP32, policy=loaded, tokenizer=tiny_tokenizer, trainable=trainable, **more)

    return examine


def actor_critic(policy: Any, kind: type[ActorCritic] = ActorCritic) -> ActorCritic:
    return kind(policy, random_value_head(policy), temperature=1.0, dtype=torch.float32)


# ---------------------------------------------------------------- sound models


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
def test_sound_models_pass_for_each_trainable(name: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    report = run(saved(name, tmp_path / name, tokenizer), None)
    assert report.passed, report.verdict
    assert {result.trainable for result in report.results} >= {"full", "lora", "head"}
    ran = {(result.check, result.trainable) for result in report.results if result.finding.status != "skip"}
    assert {(check.__name__, "lora") for check in check.POLICY} - ran == {("trunk", "lora")}
    assert [result.check for result in report.of("note")] == (["dropout"] * 4 if name == "gpt2" else [])


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
def test_sound_models_pass_with_a_reward_model(name: str, tmp_path: Path) -> None:
    folder, reward = reward_of(name, tmp_path)
    report = run(folder, reward=str(reward))
    assert report.passed, report.verdict
    ran = {result.check for result in report.results if result.finding.status != "skip"}
    assert {f"reward_{each.__name__}" for each in check.REWARD} <= ran


def test_bf16_passes_and_says_so(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "llama", make_tokenizer())
    report = check.run(CheckConfig(model=str(folder), trainable="lora", precision="bf16"), load_reward=no_reward)
    assert (report.passed, report.precision) == (True, "bf16"), report.verdict
    assert finding(report, "sampler", "pass").bound == 2e-2


def reward_of(name: str, root: Path) -> tuple[Path, Path]:
    """A tiny policy and a trained-looking reward model on it."""
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    policy = saved(name, root / "policy", tokenizer)
    classifier = models.load_classifier(str(policy), models.load_tokenizer(str(policy)))
    classifier.config.score_mean, classifier.config.score_std = 0.5, 2.0
    return policy, tiny.save(classifier, tokenizer, root / "reward")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained-looking reward model on the tiny Llama. Do not write into it."""
    return reward_of("llama", tmp_path_factory.mktemp("reward"))[1]


def test_a_sound_reward_model_passes_for_each_trainable(reward_folder: Path) -> None:
    report = run(reward_folder.parent / "policy", None, reward=str(reward_folder))
    assert report.passed, report.verdict
    assert {f"reward_{each.__name__}" for each in check.REWARD} <= {result.check for result in report.results}
    assert not [r for r in report.of("skip") if r.check.startswith("reward")]


# ---------------------------------------------------------------- faults of the source


def test_pad_equal_to_eos_is_named_and_mended(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("<|endoftext|>")
    tokenizer.pad_token = tokenizer.eos_token
    report = run(saved("llama", tmp_path / "model", tokenizer))
    found = finding(report, "pad", "note")
    assert "pads with '<eos>'" in found.cause
    assert "mended" in found.advice
    assert report.passed


def test_pad_equal_to_eos_below_the_loader_fails(policy: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    report = check.examine(FP32, policy=policy("llama", "head"), tokenizer=tokenizer, trainable="head")
    assert "the tokenizer pads with '<eos>' (1), which is EOS" in finding(report, "pad", "fail").cause


@pytest.mark.parametrize(("times", "status"), [(1, "note"), (2, "fail")])
def test_a_second_bos_is_named(times: int, status: str, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(pad="<pad>", bos="<s>")
    tokenizer.chat_template = "{{ bos_token }}" * times + CHAT_TEMPLATE
    found = finding(run(saved("llama", tmp_path / "model", tokenizer)), "bos", status)
    assert found.measured == 2
    assert ("mended" in found.advice) == (status == "note")
    assert "chat template writes" in found.cause


def test_top_k_left_in_the_generation_config_is_named(tmp_path: Path) -> None:
    left = {"top_k": 50, "temperature": 0.6, "top_p": 1.0, "do_sample": True}
    found = finding(run(saved("llama", tmp_path / "model", make_tokenizer(), left)), "generation_config", "note")
    assert "top_k 50, temperature 0.6:" in found.cause
    assert found.advice.startswith("ignored here")


def test_an_end_of_turn_that_is_no_eos_is_named(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("<|im_end|>", pad="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("\\n", "<|im_end|>\\n").replace("\n", "<|im_end|>\n")
    folder = saved("llama", tmp_path / "model", tokenizer)
    assert "'<|im_end|>'" in finding(run(folder), "end_of_turn", "note").cause
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    saved("llama", folder, tokenizer, {"eos_token_id": ends})
    assert finding(run(folder), "end_of_turn", "pass")


def test_a_template_with_todays_date_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    assert "today's date" in finding(run(saved("llama", tmp_path / "model", tokenizer)), "template", "note").cause


def test_a_template_changed_after_training_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    saved("llama", tmp_path / "base", tokenizer)
    folder = tiny.save(models.load_policy(str(tmp_path / "base"), tokenizer), tokenizer, tmp_path / "model")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant", "bot")
    tokenizer.save_pretrained(folder)
    found = finding(run(folder), "contract", "fail")
    assert "contract.json" in found.cause
    assert "chat template" in found.cause


def test_an_eos_lost_from_the_generation_config_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = saved("llama", tmp_path / "model", tokenizer, {"eos_token_id": [1, 7]})
    assert "[1, 7]" in str(finding(run(folder), "eos", "pass").measured)
    policy = models.load_policy(str(folder), tokenizer, trainable="head")
    policy.generation_config.eos_token_id = 1
    config = CheckConfig(model=str(folder), precision="fp32")
    report = check.examine(config, policy=policy, tokenizer=tokenizer, trainable="head")
    assert "names [7] as EOS" in finding(report, "eos", "fail").cause


def test_a_weight_missing_from_the_file_is_named(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model", make_tokenizer())
    lost = "model.layers.1.mlp.down_proj.weight"
    without(folder, lost)
    found = finding(run(folder), "weights", "fail")
    assert found.cause.startswith(f"{lost} is not in the model's files (1 such")


def without(folder: Path, name: str) -> None:
    """Take one weight out of a model's file."""
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- faults of sampling and training


def test_dropout_left_on_is_named(policy: Callable[..., Any], examined: Callable[..., Report]) -> None:
    loaded = policy("gpt2", "head")
    model, engine = actor_critic(loaded), Elsewhere(loaded)
    model.train()  # after both of them have put the policy into evaluation mode
    report = examined("gpt2", "head", loaded=loaded, model=model, engine=engine)
    assert "dropout is on" in finding(report, "dropout", "fail").cause
    assert finding(report, "ratio", "fail").measured > 1e-5  # type: ignore[operator]
    assert "such as dropout" in finding(report, "gradients", "fail").cause  # the update's own assertion


class Elsewhere(PlainEngine):
    """An engine that samples at a temperature of its own, or from the top k only."""

    def __init__(self, policy: Any, *, temperature: float = 1.0, top_k: int | None = None):
        super().__init__(policy, eos_token_ids=(1,), pad_token_id=0, dtype=torch.float32, batch_size=8)
        self._temperature, self._top_k = temperature, top_k

    def generate(self, prompts: Any, *, temperature: float, **more: Any) -> Any:
        if self._top_k is None:
            return super().generate(prompts, temperature=self._temperature, **more)
        whole = self._sampled.model.forward

        def truncated(*args: Any, **kwargs: Any) -> Any:
            out = whole(*args, **kwargs)
            least = out.logits.topk(self._top_k).values[..., -1:]
            out.logits = out.logits.masked_fill(out.logits < least, -1e30)
            return out

        self._sampled.model.forward = truncated
        try:
            return super().generate(prompts, temperature=temperature, **more)
        finally:
            del self._sampled.model.forward


@pytest.mark.parametrize(
    ("fault", "named"), [({"temperature": 0.7}, "it sampled with temperature 0.7"), ({"top_k": 50}, "with top-k 50")]
)
def test_another_distribution_in_the_rollout_is_named(
    fault: dict[str, Any], named: str, policy: Callable[..., Any], examined: Callable[..., Report]
) -> None:
    loaded = policy("qwen3", "head")
    report = examined("qwen3", "head", loaded=loaded, engine=Elsewhere(loaded, **fault))
    assert named in finding(report, "sampler", "fail").cause
    assert finding(report, "ratio", "pass")


def test_a_tied_head_that_moves_the_embeddings_is_named(
    policy: Callable[..., Any], examined: Callable[..., Report]
) -> None:
    loaded = policy("gpt2").requires_grad_(False)
    loaded.lm_head.requires_grad_(True)
    found = finding(examined("gpt2", "head", loaded=loaded), "frozen", "fail")
    assert "tied to the embeddings" in found.cause
    assert "wte" in found.cause


def test_positions_trained_below_the_trunk_are_named(
    policy: Callable[..., Any], examined: Callable[..., Report]
) -> None:
    loaded = policy("gpt2", LastLayers(1))
    loaded.transformer.wpe.requires_grad_(True)
    report = examined("gpt2", LastLayers(1), loaded=loaded)
    assert "the states of the frozen trunk" in finding(report, "trunk", "fail").cause


def test_a_branch_that_reads_past_its_trunk_is_named(
    policy: Callable[..., Any], examined: Callable[..., Report]
) -> None:
    loaded, lowest = policy("llama", LastLayers(1)), {}
    loaded.model.layers[0].register_forward_hook(lambda _, __, output: lowest.update(states=output))
    loaded.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] + lowest["states"], *args[1:]))
    found = finding(examined("llama", LastLayers(1), loaded=loaded), "trunk", "fail")
    assert "read more than its output" in found.cause


class TwoAdapters(ActorCritic):
    """Policy and value as adapters of one base, switched between the forwards and before the joint backward."""

    def forward(self, batch: Sequences, *, train_policy: bool = True) -> Any:
        self.policy.set_adapter("default")
        out = super().forward(batch, train_policy=train_policy)
        self.policy.set_adapter("value")
        return out


def test_an_adapters_lost_gradient_is_named(policy: Callable[..., Any], examined: Callable[..., Report]) -> None:
    loaded = policy("llama", "lora")
    loaded.add_adapter("value", loaded.peft_config["default"])
    model = actor_critic(loaded, TwoAdapters)
    found = finding(examined("llama", "lora", loaded=loaded, model=model), "gradients", "fail")
    assert "trained weights get no gradient" in found.cause
    assert "lora_" in found.cause
    assert "set_adapter" in found.advice


def test_a_mean_per_micro_batch_is_named(monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]) -> None:
    right = update.minibatch_loss
    monkeypatch.setattr(
        update, "minibatch_loss", lambda model, batch, **more: right(model, batch, **more) / batch.completion_mask.sum()
    )
    found = finding(examined("llama"), "accumulation", "fail")
    assert "splitting the batch changes the gradient" in found.cause
    assert found.measured > 0.01  # type: ignore[operator]


def test_a_forward_without_attention_mask_is_named(
    monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]
) -> None:
    right = Sequences.model_inputs

    def wrong(self: Sequences) -> dict[str, torch.Tensor]:
        inputs = right(self)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}

    monkeypatch.setattr(Sequences, "model_inputs", wrong)
    found = finding(examined("llama", "head"), "padding", "fail")
    assert found.cause.endswith("padded in a batch, just as if attention_mask were left out")


def test_positions_that_count_the_padding_are_named(
    monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]
) -> None:
    right = Sequences.model_inputs

    def wrong(self: Sequences) -> dict[str, torch.Tensor]:
        inputs = right(self)
        return inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])}

    monkeypatch.setattr(Sequences, "model_inputs", wrong)
    found = finding(examined("gpt2", "head"), "padding", "fail")  # GPT-2's positions are absolute
    assert found.cause.endswith("padded in a batch, just as if position_ids counted the padding on the left")


def test_a_mask_that_forgets_eos_is_named(monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]) -> None:
    def wrong(self: Sequences) -> torch.Tensor:
        mask = torch.arange(self.completion_ids.shape[1]) < self.completion_lengths[:, None]
        return mask & (self.completion_ids != 1)

    monkeypatch.setattr(Sequences, "completion_mask", property(wrong))
    assert "outside the mask" in finding(examined("llama", "head"), "eos_loss", "fail").cause


def test_an_engine_that_drops_eos_is_named(monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]) -> None:
    right = NativeEngine.generate

    def wrong(self: NativeEngine, prompts: Any, **more: Any) -> Any:
        drawn = right(self, prompts, **more)
        return [
            d._replace(ids=d.ids[:-1], logprobs=d.logprobs[:-1]) if d.finished and len(d.ids) > 1 else d for d in drawn
        ]

    monkeypatch.setattr(NativeEngine, "generate", wrong)
    assert "as EOS, prompt 1 gave" in finding(examined("llama", "head"), "stops", "fail").cause


class EndsElsewhere(PlainEngine):
    """An engine that ends a completion at ids of its own."""

    def __init__(self, policy: Any, ends: set[int]):
        super().__init__(policy, eos_token_ids=tuple(ends), pad_token_id=0, dtype=torch.float32, batch_size=8)


def test_an_end_at_another_id_is_named(policy: Callable[..., Any], examined: Callable[..., Report]) -> None:
    loaded = policy("llama", "head")
    every_other = EndsElsewhere(loaded, set(range(2, 384)))
    found = finding(examined("llama", "head", loaded=loaded, engine=every_other), "stops", "fail")
    assert re.fullmatch(r"completion 1 stops after \d+, which is no EOS \[1\]", found.cause)


def test_an_eos_that_ends_nothing_is_named(policy: Callable[..., Any], examined: Callable[..., Report]) -> None:
    loaded = policy("llama", "head")
    loaded.generation_config.eos_token_id = list(range(1, 384))  # whatever is drawn is EOS
    found = finding(examined("llama", "head", loaded=loaded, engine=EndsElsewhere(loaded, set())), "stops", "fail")
    assert "completion 1 goes on after EOS" in found.cause
    assert "generation stops at another id" in found.cause


def test_a_reference_that_follows_is_named(monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]) -> None:
    monkeypatch.setattr(models, "frozen_copy", lambda model: model)
    assert "moved with it" in finding(examined("llama"), "reference", "fail").cause


def test_a_lost_adapter_is_named(monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]) -> None:
    right = models.save_model

    def wrong(model: Any, tokenizer: Any, folder: Path, **more: Any) -> None:
        right(model.unload(), tokenizer, folder, **more)

    monkeypatch.setattr(models, "save_model", wrong)
    found = finding(examined("llama", "lora"), "save", "fail")
    assert "another one after saving" in found.cause


def test_a_weight_lost_in_saving_is_named(monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Report]) -> None:
    right, lost = models.save_model, "model.layers.2.self_attn.o_proj.weight"

    def wrong(model: Any, tokenizer: Any, folder: Path, **more: Any) -> None:
        right(model, tokenizer, folder, **more)
        without(folder, lost)

    monkeypatch.setattr(models, "save_model", wrong)
    found = finding(examined("llama", "full"), "save", "fail")
    assert found.cause.endswith(f": {lost} is another (1 such weights in all)")


# ---------------------------------------------------------------- faults of the reward


def test_a_head_missing_from_the_file_is_named(reward_folder: Path, tmp_path: Path) -> None:
    folder = Path(str(tmp_path / "reward"))
    folder.mkdir()
    for file in reward_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    without(folder, "score.weight")
    report = run(reward_folder.parent / "policy", reward=str(folder))
    assert "score.weight is not in the model's file" in finding(report, "reward_head", "fail").cause
    assert not report.passed
    assert "reward_head" in report.verdict


def reward_report(reward_folder: Path, break_it: Callable[[RewardModel], Any]) -> Report:
    """The report on the reward model after something was done to it in memory."""

    def load(source: str) -> RewardModel:
        reward = RewardModel.load(source, precision="fp32")
        break_it(reward)
        return reward

    config = CheckConfig(
        model=str(reward_folder.parent / "policy"), reward=str(reward_folder), trainable="head", precision="fp32"
    )
    return check.run(config, load_reward=load)


def test_a_reward_model_that_scores_before_eos_is_named(reward_folder: Path) -> None:
    def break_it(reward: RewardModel) -> None:
        reward.classifier.config.pad_token_id = reward.tokenizer.eos_token_id

    found = finding(reward_report(reward_folder, break_it), "reward_position", "fail")
    assert "it scores the token before EOS" in found.cause


def test_a_constant_head_is_named(reward_folder: Path) -> None:
    report = reward_report(reward_folder, lambda reward: reward.classifier.score.weight.data.zero_())
    assert "all get the score" in finding(report, "reward_scores", "fail").cause
    assert "not the one in the model's file" in finding(report, "reward_head", "fail").cause


def test_dropout_of_the_reward_model_is_named(reward_folder: Path) -> None:
    report = reward_report(reward_folder, lambda reward: reward.classifier.train())
    assert "in training mode" in finding(report, "reward_dropout", "fail").cause


def test_another_template_of_the_reward_model_is_named(reward_folder: Path) -> None:
    def break_it(reward: RewardModel) -> None:
        reward.contract = None
        reward.tokenizer.chat_template = CHAT_TEMPLATE.upper()

    found = finding(reward_report(reward_folder, break_it), "contract", "fail")
    assert "the policy and the reward model share a tokenizer but not a chat template" in found.cause


@pytest.mark.parametrize(
    ("reward", "status", "cause"),
    [
        (lambda prompts, completions: [float(len(c)) for c in completions], "pass", ""),
        (lambda prompts, completions: [1.0 for _ in completions], "fail", "all get the score 1"),
        (lambda prompts, completions: [random.random() for _ in completions], "fail", "the second time"),
        (lambda prompts, completions: [float("nan") for _ in completions], "fail", "must be finite"),
    ],
    ids=["length", "constant", "random", "nan"],
)
def test_a_reward_function_is_asked_for_its_scores(
    reward: Any, status: str, cause: str, examined: Callable[..., Report]
) -> None:
    report = examined("llama", "head", reward=reward)
    assert cause in finding(report, "reward_scores", status).cause
    assert finding(report, "reward_head", "skip")


# ---------------------------------------------------------------- the command


def test_exit_status_and_json(
    tiny_chat_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["check", "--model", str(tiny_chat_model_folder), "--trainable", "head", "--precision", "fp32"]
    assert cli.main([*arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["passed"] is True
    assert found["verdict"].startswith("PASS: all")
    ratio = next(each for each in found["results"] if each["check"] == "ratio")
    assert (ratio["trainable"], ratio["status"], ratio["bound"]) == ("head", "pass", 1e-5)
    monkeypatch.setattr(models, "frozen_copy", lambda model: model)
    monkeypatch.setattr(NativeEngine, "generate", lambda *_, **__: 1 / 0)
    assert cli.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "ZeroDivisionError" in shown
    assert shown.splitlines()[-1].startswith("FAIL: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the model to check is not given: pass --model"),
        (["--model", "./nowhere"], "the model folder ./nowhere does not exist"),
        (["--model", "x", "--jsn"], "did you mean --json?"),
        (["--model", "EMPTY"], "EMPTY has no config.json, so it is no model"),
        (["--model", "NO_TOKENIZER"], "NO_TOKENIZER has no tokenizer: save it beside the model"),
        (["--model", "BROKEN"], "BROKEN cannot be read as a model: It looks like the config file"),
    ],
)
def test_what_the_user_can_mend_is_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "EMPTY", tmp_path / "NO_TOKENIZER", tmp_path / "BROKEN"):
        folder.mkdir()
    (tmp_path / "NO_TOKENIZER" / "config.json").write_text('{"model_type": "llama"}')
    make_tokenizer().save_pretrained(tmp_path / "BROKEN")
    (tmp_path / "BROKEN" / "config.json").write_text("{")
    assert cli.main(["check", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_json_stands_alone_on_stdout(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud.py").write_text(
        "def score(prompts, completions):\n    print('hi')\n    return [*map(len, completions)]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = ["--model", str(tiny_model_folder), "--trainable", "head"]
    assert cli.main(["check", *model, "--reward", "loud:score", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["passed"] is True
    assert "hi" in shown.err


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(width: int, examined: Callable[..., Report]) -> None:
    console = Console(width=width, file=io.StringIO())
    results = examined("gpt2", "lora", reward=lambda prompts, completions: [1.0 for _ in completions]).results
    everywhere = [replace(r, trainable=each) for r in results if r.trainable for each in ("full", "lora", "head")]
    once = [r for r in results if not r.trainable]
    Report("m", None, "fp32", (*once, *everywhere), 1.0).print(console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    end = next(i for i, line in enumerate(lines) if line.startswith("note "))
    table, after = lines[:end], "\n".join(lines[end:])
    assert max(map(len, table)) <= width
    assert len(table) == 34 if width == 80 else len(table) > 40
    assert any("what must hold" in line for line in table) == (width == 120)
    assert any(re.match(r" ratio +pass +each of 3 +\d", line) for line in table)
    assert "dropout (each of 3): the config sets dropout" in after
    assert after.splitlines()[-1].startswith("FAIL: 1 of ")
    assert "\x1b" not in after


def test_a_language_model_is_no_reward(tiny_model_folder: Path) -> None:
    with pytest.raises(UserError, match="no trained score"):
        run(tiny_model_folder, reward=str(tiny_model_folder))


def test_own_prompts_are_used(tiny_model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i} " * (i + 1)}) + "\n" for i in range(30)))
    assert run(tiny_model_folder, prompts=str(file)).passed
    file.write_text('{"prompt": "one"}\n')
    with pytest.raises(UserError, match="give at least 2"):
        run(tiny_model_folder, prompts=str(file))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rlhf import cli\n"
        "try: cli.main(['check', '--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert "--json" in done.stdout

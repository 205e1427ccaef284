"""The loop: text and a callable in, a model folder and a record out; what moves, what stays, what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import alarms, models, ppo
from rlhf.actor_critic import ActorCritic, ValueHead, ValueModel
from rlhf.config import LastLayers, PPOExtras
from rlhf.contract import Contract
from rlhf.generation.native import NativeEngine
from rlhf.ppo import prompt_indices
from rlhf.types import ConfigError, DataError, UserError
from tests.rlhf import ppo_world as world

TECHNIQUES = ["full", "lora", "head", LastLayers(1)]


def train(
    folder: Path, tokenizer: Any, output: Path, *, policy: Any = None, value: Any = None, **changes: Any
) -> ppo.PPOResult:
    reward = changes.pop("reward", world.length_reward)
    prompts = changes.pop("prompts", world.TEXTS)
    trainable = changes.get("trainable", "full")
    return ppo.train(
        world.config(output, **changes),
        policy=policy if policy is not None else world.policy(folder, tokenizer, trainable),
        tokenizer=tokenizer,
        reward=reward,
        prompts=prompts,
        value=value,
    )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every `Task` that a run makes."""
    seen: list[Any] = []
    plain = ppo.Task.__init__

    def note(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.reference_at_start = world.snapshot(self.ref_model)
        self.policy_at_start = world.snapshot(self.learner.model.policy)
        self.frozen_at_start = {
            name: w.detach().clone() for name, w in self.learner.model.policy.named_parameters() if not w.requires_grad
        }
        seen.append(self)

    monkeypatch.setattr(ppo.Task, "__init__", note)
    return seen


def test_the_engine_rests_from_the_start_and_during_every_update(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Else its packed weights would stand beside all that a run is put together from."""
    told: list[str] = []
    for name in ("sync", "rest"):
        plain = getattr(NativeEngine, name)
        monkeypatch.setattr(NativeEngine, name, lambda self, n=name, f=plain: (told.append(n), f(self)))
    frozen_copy = models.frozen_copy
    monkeypatch.setattr(models, "frozen_copy", lambda model: (told.append("reference"), frozen_copy(model))[1])
    update = ppo.update
    monkeypatch.setattr(ppo, "update", lambda *a, **k: (told.append("update"), update(*a, **k))[1])
    train(tiny_model_folder, tiny_tokenizer, tmp_path)
    assert told[:5] == ["rest", "reference", "sync", "rest", "update"]


def test_a_lora_run_in_bf16_trains_the_adapter_on_a_base_held_in_bf16(
    watched: list[Any], tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """What it leaves behind is the adapter, for the base as it lies in its folder."""
    found = train(tiny_model_folder, tiny_tokenizer, tmp_path, trainable="lora", precision="bf16")
    policy = watched[0].learner.model.policy
    assert {w.dtype for w in models.trainable_parameters(policy).values()} == {torch.float32}
    held = [m.base_layer.weight for m in policy.modules() if hasattr(m, "base_layer")]
    assert {w.dtype for w in held} == {torch.bfloat16}
    theirs = {id(w) for w in watched[0].ref_model.parameters()}
    assert all(id(w) in theirs for w in held)
    again = models.load_policy(str(found.model_folder), tiny_tokenizer, trainable="lora")
    trained, kept = models.trainable_parameters(policy), models.trainable_parameters(again)
    assert all(torch.equal(trained[name], kept[name]) for name in trained)
    assert any((w != 0).any() for name, w in kept.items() if "lora_B" in name)
    assert world.records(tmp_path)[0]["objective/kl"] == 0, "policy and reference are the same before the first step"


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(("count", "size"), [(7, 3), (5, 5), (3, 8), (10, 4), (1, 2), (4, 1)])
def test_every_prompt_is_used_once_an_epoch_each_epoch_in_another_order(count: int, size: int) -> None:
    used = [index for step in range(6 * count) for index in prompt_indices(count, step, size, seed=0)]
    epochs = [used[start : start + count] for start in range(0, len(used) - count + 1, count)]
    assert len(used) == 6 * count * size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 4:
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2


def test_the_prompts_of_a_step_depend_on_seed_and_step_alone() -> None:
    assert prompt_indices(9, 5, 4, seed=1) == prompt_indices(9, 5, 4, seed=1)
    assert prompt_indices(9, 5, 4, seed=1) != prompt_indices(9, 5, 4, seed=2)


def test_with_rloo_the_samples_of_a_prompt_stand_side_by_side(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        asked.append(list(prompts))
        return world.length_reward(prompts, completions)

    extras = PPOExtras(rloo_samples=4)
    result = train(tiny_model_folder, tiny_tokenizer, tmp_path, extras=extras, reward=reward, total_episodes=24)
    assert len(asked) == 3
    used = [prompts[i] for prompts in asked for i in (0, 4)]
    assert all(prompts[i : i + 4] == [prompts[i]] * 4 for prompts in asked for i in (0, 4))
    assert Counter(used) == dict.fromkeys(world.TEXTS, 1), "six prompts in three steps of two"
    assert result.metrics["grad_norm/value"] == 0
    assert not (tmp_path / "value").exists()


def test_prompts_that_are_too_long_are_left_out(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    asked: set[Any] = set()

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        asked.update(prompts)
        return [0.0] * len(prompts)

    prompts = ["the film", "the film is a good and funny story of a man and his dog . " * 5, "a"]
    train(tiny_model_folder, tiny_tokenizer, tmp_path, prompts=prompts, reward=reward, max_prompt_tokens=8)
    assert asked == {"the film", "a"}


# ---------------------------------------------------------------- a whole run


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(ord(name[0]))  # the global stream has no say
        train(tiny_model_folder, tiny_tokenizer, tmp_path / name, seed=seed, total_episodes=16)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert world.records(one) == world.records(two) != world.records(three)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_a_record_and_a_folder_that_transformers_reads(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    result = train(tiny_model_folder, tiny_tokenizer, tmp_path, total_episodes=37)
    records = world.records(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4], "37 episodes are four steps of 8, and no part of one"
    assert [record["episode"] for record in records] == [8, 16, 24, 32]
    of_steps = [8 * record["gen/length_mean"] for record in records]
    assert [record["tokens"] for record in records] == pytest.approx([sum(of_steps[: n + 1]) for n in range(4)])
    assert set(result.metrics) | {"step"} == set(records[-1])
    plain = AutoModelForCausalLM.from_pretrained(result.model_folder)
    trained = dict(result.policy.named_parameters())
    assert all(torch.equal(w, trained[name]) for name, w in plain.named_parameters())
    assert not any(torch.equal(w, s) for w, s in [(plain.lm_head.weight, load(tiny_model_folder).lm_head.weight)])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "score", "kl", "finished"} <= set(samples[0])
    assert load_file(tmp_path / "value" / "value.safetensors")["linear.weight"].shape == (1, 32)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_score_rises(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A reward that pays for each `e`: twenty small steps are enough to see more of them."""

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [float(completion.count("e")) for completion in completions]

    train(
        tiny_model_folder,
        tiny_tokenizer,
        tmp_path,
        reward=reward,
        total_episodes=32 * 16,
        batch_size=32,
        micro_batch_size=16,
        learning_rate=1e-2,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        save_every=100,
    )
    scores = [record["objective/scores"] for record in world.records(tmp_path)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5


@pytest.mark.parametrize("trainable", TECHNIQUES, ids=str)
def test_the_reference_and_all_that_is_frozen_never_move(
    trainable: Any, tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, watched: list[Any]
) -> None:
    train(tiny_model_folder, tiny_tokenizer, tmp_path, trainable=trainable, total_episodes=24)
    (task,) = watched
    policy = task.learner.model.policy
    assert world.same(task.reference_at_start, task.ref_model)
    for name, weight in policy.named_parameters():
        if name in task.frozen_at_start:
            assert torch.equal(weight, task.frozen_at_start[name]), name
    trained = models.trainable_parameters(policy)
    unmoved = [name for name, weight in trained.items() if torch.equal(weight, task.policy_at_start[name])]
    assert not unmoved, "every trainable weight has learned"
    records = world.records(tmp_path)
    assert abs(records[0]["objective/kl"]) < 1e-5, "before the first update the policy is the reference"
    assert abs(records[1]["objective/kl"]) < 1e-5, "and after the warm-up still"
    assert records[2]["objective/kl"] != 0


def test_during_the_warm_up_only_the_value_moves(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, watched: list[Any]
) -> None:
    train(tiny_model_folder, tiny_tokenizer, tmp_path, value_warmup_steps=2, total_episodes=16)
    (task,) = watched
    assert world.same(task.policy_at_start, task.learner.model.policy)
    assert task.learner.model.value.linear.weight.abs().max() > 0
    for record in world.records(tmp_path):
        assert record["grad_norm/policy"] == 0 < record["grad_norm/value"]


def test_the_sampler_sees_what_the_training_forward_sees(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    train(tiny_model_folder, tiny_tokenizer, tmp_path, temperature=0.7, learning_rate=1e-2)
    for record in world.records(tmp_path):
        assert abs(record["gen/sampler_logprob_gap"]) < 1e-5
        assert record["val/skipped_steps"] == 0
        assert all(math.isfinite(value) for value in record.values())


def test_rollouts_differ_from_step_to_step_and_from_process_to_process(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, watched: list[Any]
) -> None:
    """Nothing moves (a learning rate of next to nothing), and one prompt is all there is: only the seed can differ."""
    drawn: list[tuple[str, ...]] = []

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        drawn.append(tuple(completions))
        return [0.0] * len(prompts)

    train(tiny_model_folder, tiny_tokenizer, tmp_path, prompts=["a film"], reward=reward, learning_rate=1e-12)
    assert len(set(drawn)) == 4
    (task,) = watched
    first, second = (
        torch.rand(4, 5, generator=task._random_rows(0, row), dtype=torch.float64).tolist() for row in (0, 4)
    )
    both = torch.rand(8, 5, generator=task._random_rows(0, 0), dtype=torch.float64).tolist()
    assert both == first + second, "the processes share out the numbers of one"


# ---------------------------------------------------------------- schedules


def test_the_learning_rate_falls_to_zero_or_stays(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, watched: list[Any]
) -> None:
    for schedule, expected in (("linear", [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]), ("constant", [1e-3] * 4)):
        train(tiny_model_folder, tiny_tokenizer, tmp_path / schedule, schedule=schedule)
        assert [record["lr"] for record in world.records(tmp_path / schedule)] == pytest.approx(expected)
        policy, value = watched[-1].learner.optimizer.param_groups
        assert value["lr"] == pytest.approx(10 * policy["lr"]), "a new head learns ten times as fast"
    assert watched[0].learner.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_value_has_its_own_learning_rate(tmp_path: Path) -> None:
    given = world.config(tmp_path, value_learning_rate=3e-4)
    plain = world.config(tmp_path)
    head, critic = ValueHead(4), ValueModel(torch.nn.Identity(), ValueHead(4))
    assert ppo._value_learning_rate(given, head) == 3e-4
    assert ppo._value_learning_rate(plain, head) == pytest.approx(1e-2)
    assert ppo._value_learning_rate(plain, critic) == pytest.approx(1e-3)


def test_the_controller_is_fed_the_kl_per_sequence_of_the_run(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[tuple[float, int]] = []
    plain = ppo.AdaptiveKL.update

    def note(self: Any, kl: float, episodes: int) -> None:
        fed.append((kl, episodes))
        plain(self, kl, episodes)

    monkeypatch.setattr(ppo.AdaptiveKL, "update", note)
    train(tiny_model_folder, tiny_tokenizer, tmp_path, kl_target=0.01, kl_horizon=200, learning_rate=1e-2)
    records = world.records(tmp_path)
    assert fed == [(record["objective/kl"], 8) for record in records]
    assert records[-1]["objective/kl"] != 0
    value = 0.05
    for record in records:
        assert record["objective/kl_coef"] == pytest.approx(value, rel=1e-12)
        value *= 1 + min(max(record["objective/kl"] / 0.01 - 1, -0.2), 0.2) * 8 / 200


# ---------------------------------------------------------------- trouble


def test_a_score_that_is_no_number_ends_the_run_and_the_last_checkpoint_is_sound(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    calls = iter(range(100))

    def sick(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        scores = world.length_reward(prompts, completions)
        return [float("nan"), *scores[1:]] if next(calls) == 2 else scores

    with pytest.raises(UserError, match=r"the reward \S*sick returned nan for the completion"):
        train(tiny_model_folder, tiny_tokenizer, tmp_path / "sick", reward=sick)
    assert json.loads((tmp_path / "sick" / "env.json").read_text())["status"] == "failed"
    train(tiny_model_folder, tiny_tokenizer, tmp_path / "sick")
    train(tiny_model_folder, tiny_tokenizer, tmp_path / "well")
    assert world.records(tmp_path / "sick") == world.records(tmp_path / "well")


def test_weights_that_would_not_learn_are_refused(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    frozen = models.load_policy(str(tiny_model_folder), tiny_tokenizer)
    with pytest.raises(ConfigError, match="no weight of the policy is trainable"):
        train(tiny_model_folder, tiny_tokenizer, tmp_path, policy=frozen)
    coarse = world.policy(tiny_model_folder, tiny_tokenizer).bfloat16()
    with pytest.raises(ConfigError, match=r"torch\.bfloat16, in which small steps are lost: load it with dtype=torch"):
        train(tiny_model_folder, tiny_tokenizer, tmp_path, policy=coarse)


def test_without_prompts_there_is_nothing_to_do(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt to train on"):
        train(tiny_model_folder, tiny_tokenizer, tmp_path, prompts=[])


def test_demonstrations_to_mix_in_must_fit(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    path.write_text(json.dumps({"prompt": "the film is a good film", "completion": "yes"}) + "\n")
    extras = PPOExtras(ptx_coef=1.0, ptx_data=str(path))
    with pytest.raises(DataError, match=r"no demonstration of extras\.ptx_data fits max_prompt_tokens = 3"):
        train(
            tiny_model_folder,
            tiny_tokenizer,
            tmp_path / "run",
            prompts=["a"],
            extras=extras,
            held_out=0.0,
            max_prompt_tokens=3,
        )


def test_numbers_that_are_not_finite_end_the_run() -> None:
    with pytest.raises(UserError, match=r"loss/policy_avg became NaN or infinite: the last checkpoint is sound"):
        ppo._raise_alarms(None, {"loss/policy_avg": float("nan"), "x": 1.0}, {"start": {}, "alarmed": {}}, 3)  # type: ignore[arg-type]


def test_the_same_alarm_is_raised_again_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(alarms, "alarms", lambda now, start: [alarms.Alarm("length", "grew", "look")])

    class Tracker:
        def alert(self, *_: str) -> None:
            raised.append(step)

    running: dict[str, Any] = {"start": {}, "alarmed": {}}
    for step in range(45):
        ppo._raise_alarms(Tracker(), {}, running, step)  # type: ignore[arg-type]
    assert raised == [0, 20, 40]


# ---------------------------------------------------------------- the stage


@pytest.fixture
def prompts_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in world.TEXTS))
    return str(path)


def test_the_stage_reads_files_and_hands_the_contract_to_the_reward(
    tiny_model_folder: Path, prompts_file: str, tmp_path: Path
) -> None:
    asked: list[tuple[str, Contract]] = []
    seen: set[Any] = set()

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        seen.update(prompts)
        return world.length_reward(prompts, completions)

    def load_reward(source: str, contract: Contract) -> Any:
        asked.append((source, contract))
        return reward

    config = world.config(
        tmp_path / "ppo",
        model=str(tiny_model_folder),
        reward="some:where",
        prompts=prompts_file,
        held_out=0.5,
        total_episodes=24,
        trainable=LastLayers(1),
    )
    result = ppo.run(config, load_reward=load_reward)
    ((source, contract),) = asked
    assert source == "some:where"
    assert contract.max_completion_tokens == 5
    assert contract.trunk_depth == 2
    assert 0 < len(seen) < len(world.TEXTS), "held-out prompts are not trained on"
    assert (result.model_folder / "contract.json").is_file()


@pytest.mark.parametrize(("missing", "flag"), [("model", "--model"), ("reward", "--reward"), ("prompts", "--prompts")])
def test_what_is_missing_is_named_with_its_flag(missing: str, flag: str, prompts_file: str, tmp_path: Path) -> None:
    given = {"model": "m", "reward": "r:r", "prompts": prompts_file} | {missing: None}
    with pytest.raises(ConfigError, match=flag):
        ppo.run(world.config(tmp_path, **given), load_reward=lambda *_: world.length_reward)


@pytest.mark.parametrize("trainable", ["full", "lora", LastLayers(1)], ids=str)
def test_a_separate_critic_comes_from_the_reward_model_where_it_reads_the_same_tokens_else_from_the_policy(
    trainable: Any, tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    classifier = models.load_classifier(str(tiny_model_folder), tiny_tokenizer, trainable="full", seed=2)
    policy = world.policy(tiny_model_folder, tiny_tokenizer)
    limits = {"max_prompt_tokens": 8, "max_completion_tokens": 8}
    for folder, model in (("reward", classifier), ("policy", policy)):
        contract = models.model_contract(model, tiny_tokenizer, **limits)
        models.save_model(model, tiny_tokenizer, tmp_path / folder, contract=contract)
    policy = models.load_policy(str(tmp_path / "policy"), tiny_tokenizer, trainable=trainable)
    for reward, same_head in ((str(tmp_path / "reward"), True), ("module:function", False)):
        config = world.config(
            tmp_path, model=str(tmp_path / "policy"), reward=reward, trainable=trainable, value="separate"
        )
        critic = ppo._separate_critic(config, policy, tiny_tokenizer)
        model = ActorCritic(policy, critic, temperature=1.0, dtype=torch.float32)
        assert torch.equal(critic.head.linear.weight, classifier.score.weight) == same_head
        assert (critic.head.linear.weight == 0).all() == (not same_head)
        shared = {id(w) for w in model.policy_parameters()} & {id(w) for w in model.value_parameters()}
        assert not shared, "a critic of its own trains no weight of the policy"
        assert model.value_parameters()
        trained = [name for name, w in critic.named_parameters() if w.requires_grad and not name.startswith("head")]
        assert trained
        assert all(("lora" in name) == (trainable == "lora") for name in trained)

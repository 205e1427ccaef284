"""Two policies side by side: the same random numbers, the reward's own scores, the KL, and what a run holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reward_models.model import RewardModel
from rlhf import chat, chat_html, models
from rlhf.chat import Answer, Chat, Exchange, Question, Talk
from rlhf.chat_sources import find
from rlhf.config import ChatConfig
from rlhf.contract import Contract
from rlhf.generation import Generated
from rlhf.run_folder import read_records
from rlhf.types import ConfigError, ContractError, DataError, Prompt, UserError
from tests.conftest import CHAT_TEMPLATE, make_model_folder, make_tokenizer

CPU_FP32: dict[str, Any] = {"precision": "fp32"}


def length_of(prompts: list[Prompt], completions: list[str]) -> list[float]:
    """A reward: longer is better."""
    return [len(completion) / 10 for completion in completions]


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Any) -> Path:
    """A second policy with the tokenizer of the first and other weights."""
    return make_model_folder(tmp_path_factory.mktemp("other") / "model", tiny_chat_tokenizer, seed=1)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory, tiny_chat_model_folder: Path) -> Path:
    """A reward model with a calibration of its own."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = models.load_tokenizer(str(tiny_chat_model_folder))
    classifier = models.load_classifier(str(tiny_chat_model_folder), tokenizer, seed=3)
    classifier.config.score_mean, classifier.config.score_std = 0.25, 0.125
    contract = models.model_contract(classifier, tokenizer, max_prompt_tokens=16, max_completion_tokens=8)
    models.save_model(classifier, tokenizer, folder, contract=contract)
    return folder


@pytest.fixture
def open_chat(tiny_chat_model_folder: Path, other_folder: Path) -> Callable[..., Chat]:
    """A chat of two different policies, or of what is named."""

    def start(reward: Any = length_of, **settings: Any) -> Chat:
        named = {"policy": str(other_folder), "baseline": str(tiny_chat_model_folder), "reward": "a:b"}
        config = ChatConfig(**{**named, "max_completion_tokens": 8, **CPU_FP32, **settings})
        return chat.load(config, load_reward=lambda source, contract: reward)

    return start


def ask(chat: Chat, text: str = "the film is", talk: Talk | None = None, **settings: Any) -> Exchange:
    question = Question(text, **{"max_tokens": 8, **settings})
    return list(chat.ask(question, talk or Talk()))[-1]


def texts(exchange: Exchange) -> list[str]:
    return [answer.text for answer in exchange.answers]


def test_a_seed_gives_its_answers_again_and_another_seed_others(open_chat: Callable[..., Chat]) -> None:
    both = open_chat()
    first, again, other = ask(both, seed=5), ask(both, seed=5, temperature=1), ask(both, seed=6)
    assert texts(first) == texts(again)
    assert texts(first) != texts(other)
    assert texts(first)[0] != texts(first)[1]  # or the next test would show nothing


def test_copies_of_one_model_say_the_same(open_chat: Callable[..., Chat], tiny_chat_model_folder: Path) -> None:
    same = open_chat(policy=str(tiny_chat_model_folder))
    for seed in range(3):
        one, other = ask(same, seed=seed).answers
        assert (one.text, one.tokens, one.score) == (other.text, other.tokens, other.score)
        assert one.log_ratio == other.log_ratio == 0.0
    name = tiny_chat_model_folder.parent.name
    assert [side.name for side in same.sides] == [f"{name} (baseline)", f"{name} (policy)"]


class Scripted:
    """An engine that writes given ids and keeps the uniform numbers that it was given."""

    def __init__(self, ids: list[int], finished: bool = True):
        self.ids, self.finished, self.uniforms = ids, finished, []

    def generate(self, prompts: Any, *, max_tokens: int, temperature: float, generator: torch.Generator) -> Any:
        self.uniforms.append(torch.rand(max_tokens, generator=generator, dtype=torch.float64).tolist())
        return [Generated(self.ids, [0.0] * len(self.ids), self.finished) for _ in prompts]

    def sync(self) -> None: ...

    def rest(self) -> None: ...


def scripted(both: Chat, *engines: Scripted) -> Chat:
    """The same chat with other engines."""
    sides = [replace(side, engine=engine) for side, engine in zip(both.sides, engines, strict=True)]
    return Chat(sides, both.reward, precision="fp32")


def test_both_policies_see_the_numbers_of_the_seed(open_chat: Callable[..., Chat]) -> None:
    one, other = Scripted([5, 1]), Scripted([7, 8, 9], finished=False)
    exchange = ask(scripted(open_chat(), one, other), seed=11)
    expected = torch.rand(8, generator=torch.Generator().manual_seed(11), dtype=torch.float64).tolist()
    assert one.uniforms == other.uniforms == [expected]
    assert [(answer.tokens, answer.finished) for answer in exchange.answers] == [(2, True), (3, False)]


def test_the_log_ratio_is_that_of_the_tokens_at_the_temperature(open_chat: Callable[..., Chat]) -> None:
    """Against transformers' own logits and torch's log-softmax, token by token."""
    both, written = open_chat(), ([40, 41, 1], [77, 3, 12, 300])
    exchange = ask(scripted(both, *map(Scripted, written)), temperature=0.7)
    prompt = both.sides[0].tokenizer("the film is", add_special_tokens=False).input_ids
    for answer, ids in zip(exchange.answers, written, strict=True):
        row = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            tables = [torch.log_softmax(side.model(row).logits[0].double() / 0.7, -1) for side in both.sides]
        sums = [sum(float(table[len(prompt) + i - 1, token]) for i, token in enumerate(ids)) for table in tables]
        assert answer.log_ratio == pytest.approx(sums[1] - sums[0], abs=1e-5)
        assert abs(answer.log_ratio or 0.0) > 0.01


def test_scores_are_the_rewards_own(open_chat: Callable[..., Chat], reward_folder: Path) -> None:
    reward = RewardModel.load(reward_folder, precision="fp32")
    both, asked = open_chat(reward), {"conversation": True, "seed": 2}
    first = ask(both, **asked)
    second = ask(both, "and the end?", Talk((first,)), **asked)
    alone = RewardModel.load(reward_folder, precision="fp32")
    for exchange in (first, second):
        for answer in exchange.answers:
            assert answer.score == pytest.approx(alone([answer.prompt], [answer.text])[0], abs=1e-6)
            raw = float(alone.raw_scores([answer.prompt], [answer.text])[0])
            assert answer.score == pytest.approx((raw - 0.25) / 0.125, abs=1e-5)


def test_in_a_conversation_each_goes_on_from_its_own_answers(open_chat: Callable[..., Chat]) -> None:
    both = open_chat()
    talk = Talk(opening=({"role": "system", "content": "be brief"},)).plus(ask(both, "no turn of it"))
    first = ask(both, "hello", talk, conversation=True)
    second = ask(both, "why?", talk.plus(first), conversation=True)
    for place, answer in enumerate(second.answers):
        assert answer.prompt == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": texts(first)[place]},
            {"role": "user", "content": "why?"},
        ]
    assert ask(both, "why?", talk.plus(first)).answers[0].prompt == "why?"
    assert talk.plus(first).without_last() == talk


def test_answers_come_one_by_one_and_the_exchange_is_kept_whole(
    open_chat: Callable[..., Chat], tmp_path: Path, tiny_chat_model_folder: Path, other_folder: Path
) -> None:
    both = open_chat(output=str(tmp_path / "mine"))
    said = list(both.ask(Question("the film is", max_tokens=4, seed=9), Talk()))
    assert [len(exchange.answers) for exchange in said] == [1, 2]
    ask(both)
    kept = read_records(tmp_path / "mine" / "chat.jsonl")
    assert len(kept) == 2
    assert kept[0]["question"]["seed"] == 9
    assert [answer["text"] for answer in kept[0]["answers"]] == texts(said[-1])
    assert list(kept[0]["models"].values()) == [str(tiny_chat_model_folder), str(other_folder)]
    assert kept[0]["reward"] == "a:b"


def test_a_full_disk_loses_the_line_and_not_the_answers(open_chat: Callable[..., Chat]) -> None:
    both = open_chat()
    both.log = Path("/dev/full")
    asked = both.ask(Question("the film is", max_tokens=2), Talk())
    assert [len(next(asked).answers), len(next(asked).answers)] == [1, 2]
    with pytest.raises(DataError, match="not kept: /dev/full cannot be written"):
        next(asked)


def test_a_policy_alone_has_a_score_and_no_kl(open_chat: Callable[..., Chat], capsys: Any) -> None:
    alone = open_chat(baseline=None)
    (answer,) = ask(alone).answers
    assert answer.log_ratio is None
    assert answer.score == len(answer.text) / 10
    assert "answers alone" in capsys.readouterr().err


def test_without_a_reward_there_is_no_score(open_chat: Callable[..., Chat]) -> None:
    assert [answer.score for answer in ask(open_chat(reward=None)).answers] == [None, None]


def test_other_tokenizers_have_no_common_log_ratio(open_chat: Callable[..., Chat], tmp_path: Path) -> None:
    other = make_tokenizer(CHAT_TEMPLATE)
    other.add_tokens(["<more>"])
    both = open_chat(policy=str(make_model_folder(tmp_path / "model", other)))
    assert [answer.log_ratio for answer in ask(both).answers] == [None, None]


def test_two_templates_of_one_tokenizer_are_refused(open_chat: Callable[..., Chat], tiny_model_folder: Path) -> None:
    with pytest.raises(ContractError, match="share a tokenizer but not a chat template"):
        open_chat(policy=str(tiny_model_folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature is 0, but it must be a number from 0.01"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_tokens": 0}, "max tokens is 0, but it must be a number from 1"),
        ({"seed": -1}, "seed is -1, but it must be a number from 0"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Question("p", **settings)


def test_questions_that_cannot_be_answered_are_refused(open_chat: Callable[..., Chat]) -> None:
    both = open_chat()
    with pytest.raises(DataError, match="there is no prompt yet"):
        ask(both, "  \n")
    with pytest.raises(DataError, match=r"reads 256 tokens, but the prompt has \d+ and up to 250 are to come"):
        ask(both, max_tokens=250, text="the film is good and funny")

    def broken(prompts: Any, completions: Any) -> list[float]:
        raise KeyError("<b>")

    with pytest.raises(UserError, match="broken failed"):
        ask(open_chat(broken))


def test_examples_are_held_out_prompts_that_can_be_asked(open_chat: Callable[..., Chat], tmp_path: Path) -> None:
    rows: list[Prompt] = ["a film", [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ends so"}]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    assert sorted(map(str, open_chat(prompts=str(file)).examples)) == sorted(map(str, rows[:2]))
    with pytest.raises(DataError):
        open_chat(prompts=str(tmp_path / "none.jsonl"))


def make_run(folder: Path, *stages: str, **ppo: Any) -> Path:
    """The folders of a run whose stages are done, with what PPO was told."""
    for stage in stages:
        (folder / stage / "model").mkdir(parents=True)
    if ppo:
        (folder / "ppo").mkdir(parents=True, exist_ok=True)
        (folder / "ppo" / "config.yaml").write_text(yaml.safe_dump(ppo))
    return folder


def test_a_run_gives_its_policies_reward_prompts_and_place(tmp_path: Path) -> None:
    told = {"model": "elsewhere", "reward": "elsewhere", "prompts": "m:f", "held_out": 0.2, "columns": {"prompt": "q"}}
    run = make_run(tmp_path / "film", "sft", "ppo", "reward", **told)
    found = find(ChatConfig(run=str(run)))
    assert found.policies == (("SFT", f"{run}/sft/model"), ("PPO", f"{run}/ppo/model"))
    assert (found.reward, found.log) == (f"{run}/reward/model", run / "chat.jsonl")
    assert (found.prompts, found.held_out, found.columns) == ("m:f", 0.2, {"prompt": "q"})
    mine = find(ChatConfig(run=str(run), policy="a/b", reward="m:g", prompts="p.jsonl", output=str(tmp_path)))
    assert mine.policies == (("SFT", f"{run}/sft/model"), ("b", "a/b"))
    assert (mine.reward, mine.log, mine.prompts) == ("m:g", tmp_path / "chat.jsonl", "p.jsonl")
    assert (mine.held_out, mine.columns) == (0.0, {})


def test_a_run_that_is_under_way_has_its_sft_policy_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sft", model="x", reward="m:f")
    found = find(ChatConfig(run=str(run)))
    assert (found.policies, found.reward) == ((("SFT", f"{run}/sft/model"),), "m:f")


def test_a_run_of_ppo_alone_has_the_model_it_began_with(tmp_path: Path) -> None:
    run = make_run(tmp_path, "ppo", model="someone/SmolLM2", reward="m:f")
    assert find(ChatConfig(run=str(run))).policies[0] == ("SmolLM2", "someone/SmolLM2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither a run nor a policy is given: pass --run runs/NAME"),
        ({"run": "nowhere"}, "run is 'nowhere', which is no folder"),
        ({"run": "empty"}, "empty holds no policy yet, neither ppo/model nor sft/model"),
        ({"run": "torn"}, "ppo/config.yaml cannot be read"),
    ],
)
def test_what_is_missing_is_named(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "torn", "sft", model="x")
    (tmp_path / "torn/ppo/config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=re.escape(message)):
        find(ChatConfig(**settings))


HOSTILE = '<img src=x onerror="window.pwned=1"> ${1} {{2}} & </script>'


def test_html_holds_every_text_escaped(open_chat: Callable[..., Chat]) -> None:
    both = open_chat()
    both.sides = tuple(replace(side, name=f"{side.name} {HOSTILE}") for side in both.sides)
    both.reward_source = HOSTILE
    answers = tuple(Answer(HOSTILE, HOSTILE, HOSTILE, 3, True, 0.1, score, -0.001) for score in (1.5, -2.0))
    opening: Any = ({"role": HOSTILE, "content": HOSTILE},)
    talk = Talk(
        (Exchange(Question(HOSTILE, conversation=True), answers), Exchange(Question(HOSTILE), answers)), opening
    )
    waiting = Exchange(Question(HOSTILE * 9), answers[:1])
    html = chat_html.transcript(both, talk, waiting) + chat_html.header(both) + chat_html.problem(DataError(HOSTILE))
    assert "<img" not in html
    assert "script>" not in html
    assert html.count("&lt;img src=x onerror=&quot;") >= 20
    assert "scored higher in 0 of 2 exchanges; mean difference \u22123.50" in html
    assert "score +1.50" in html
    assert "KL +0.00 nats" in html  # no minus zero
    assert html.count('data-wins="true"') == 2


def test_a_contract_reaches_the_reward(tiny_chat_model_folder: Path) -> None:
    """So that a reward model of another template is refused before the page opens."""
    seen: list[Contract] = []

    def load_reward(source: str, contract: Contract) -> Any:
        seen.append(contract)
        raise ContractError("other text")

    with pytest.raises(ContractError, match="other text"):
        chat.load(ChatConfig(policy=str(tiny_chat_model_folder), reward="r"), load_reward=load_reward)
    assert seen[0].template == CHAT_TEMPLATE


@pytest.mark.parametrize(("asked", "limit"), [(None, 128), (200, 200)])
def test_a_model_without_contract_begins_with_half_of_what_it_reads(
    asked: int | None, limit: int, open_chat: Callable[..., Chat]
) -> None:
    assert open_chat(max_completion_tokens=asked).max_tokens == limit

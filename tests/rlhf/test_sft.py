"""Fine-tuning: what the loss sees, what is cut or left out, what moves, and what the stage leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import checkpoint, models, sft
from rlhf.config import LastLayers, SFTConfig
from rlhf.types import DataError, Demonstration, UserError
from tests.rlhf import ppo_world as world

SHOWN = [
    Demonstration("the film is ", "a good and funny story"),
    Demonstration("a dull film ", "that you will forget"),
    Demonstration("it is ", "not"),
    Demonstration("the cast ", "is great"),
]


def config(output: Path, **changes: Any) -> SFTConfig:
    wanted: dict[str, Any] = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "log_every": 1,
        "max_prompt_tokens": 12,
        "max_completion_tokens": 20,
        "precision": "fp32",
        "tracking": world.OFF,
    }
    return SFTConfig(output=str(output), **(wanted | changes))


def train(folder: Path, tokenizer: Any, given: SFTConfig, *, policy: Any = None, **more: Any) -> sft.SFTResult:
    policy = policy if policy is not None else world.policy(folder, tokenizer, given.trainable)
    return sft.train(given, policy=policy, tokenizer=tokenizer, training=SHOWN, **more)


def nll(model: Any, row: dict[str, list[int]]) -> tuple[float, int]:
    """Summed negative logprob of the tokens that have a label, one sequence at a time, and how many they are."""
    ids, labels = row["input_ids"], row["labels"]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    learned = [t for t, label in enumerate(labels) if label != sft.IGNORED]
    return -sum(float(logprobs[t - 1, labels[t]]) for t in learned), len(learned)


# ---------------------------------------------------------------- labels


def test_the_loss_is_on_the_completion_from_its_first_token_to_its_eos(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for shown, row in zip(SHOWN, sft.encode(config(tmp_path), tiny_tokenizer, SHOWN), strict=True):
        prompt = tiny_tokenizer(shown.prompt, add_special_tokens=False).input_ids
        completion = tiny_tokenizer(shown.completion, add_special_tokens=False).input_ids
        assert row["input_ids"] == [*prompt, *completion, tiny_tokenizer.eos_token_id]
        assert row["labels"] == [*[-100] * len(prompt), *completion, tiny_tokenizer.eos_token_id]


def test_what_is_too_long_is_cut_or_left_out(
    tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [Demonstration("the film is a good and funny story of a man", "x"), Demonstration("a", "not " * 20)]
    (row,) = sft.encode(config(tmp_path, max_prompt_tokens=4, max_completion_tokens=8), tiny_tokenizer, long)
    prompt = len(tiny_tokenizer("a").input_ids)
    assert len(row["input_ids"]) == prompt + 8
    assert row["labels"][-1] == tiny_tokenizer.eos_token_id
    assert "1 prompts are longer than max_prompt_tokens: left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of 1 demonstrations fits max_prompt_tokens = 4"):
        sft.train(
            config(tmp_path, max_prompt_tokens=4),
            policy=torch.nn.Linear(1, 1),
            tokenizer=tiny_tokenizer,
            training=long[:1],
        )


def test_a_template_changes_the_rows_at_once(tiny_chat_tokenizer: Any, tmp_path: Path) -> None:
    """Nothing is cached between runs: another template gives other ids."""
    shown = [Demonstration([{"role": "user", "content": "film?"}], "good")]
    given = config(tmp_path, max_prompt_tokens=64)
    (first,) = sft.encode(given, tiny_chat_tokenizer, shown)
    template = tiny_chat_tokenizer.chat_template
    try:
        tiny_chat_tokenizer.chat_template = template.replace("<assistant>", "<answer>")
        (second,) = sft.encode(given, tiny_chat_tokenizer, shown)
    finally:
        tiny_chat_tokenizer.chat_template = template
    assert first["input_ids"] != second["input_ids"]
    assert first["input_ids"][-2:] == second["input_ids"][-2:]


# ---------------------------------------------------------------- training


def test_the_trainer_minimises_the_mean_over_the_completions_tokens(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """What reaches the model is exactly our ids and labels, and the logged loss is the mean over tokens."""
    given = config(tmp_path)
    policy = world.policy(tiny_model_folder, tiny_tokenizer)
    rows = sft.encode(given, tiny_tokenizer, SHOWN)
    expected = [nll(policy, row) for row in rows]
    seen: list[tuple[list[int], list[int]]] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if module.training:
            for ids, mask, labels in zip(
                options["input_ids"], options["attention_mask"], options["labels"], strict=True
            ):
                n = int(mask.sum())
                assert (labels[n:] == -100).all()
                seen.append((ids[:n].tolist(), labels[:n].tolist()))

    handle = policy.register_forward_pre_hook(note, with_kwargs=True)
    train(tiny_model_folder, tiny_tokenizer, given, policy=policy)
    handle.remove()
    assert sorted(seen) == sorted((row["input_ids"], row["labels"]) for row in rows)
    record = world.records(tmp_path)[0]
    assert record["train/loss"] == pytest.approx(sum(n for n, _ in expected) / sum(t for _, t in expected), rel=1e-4)


@pytest.mark.parametrize(
    ("trainable", "share"), [("full", 0.3), ("head", 0.8), ("lora", 0.95), (LastLayers(1), 0.95)], ids=str
)
def test_it_learns_to_write_the_demonstration_and_to_end(
    trainable: Any, share: float, tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Under a frozen head with small weights no logit can be large, so that less of the loss goes."""
    given = config(tmp_path, epochs=25, learning_rate=3e-2, trainable=trainable, log_every=25)
    before = world.policy(tiny_model_folder, tiny_tokenizer)
    held_out = [Demonstration("the film is ", "a good and funny story")]
    result = train(tiny_model_folder, tiny_tokenizer, given, held_out=held_out)
    rows = sft.encode(given, tiny_tokenizer, SHOWN)
    first, last = (sum(nll(model, row)[0] for row in rows) for model in (before, result.policy))
    assert last < share * first
    (row,) = sft.encode(given, tiny_tokenizer, held_out)
    total, tokens = nll(result.policy, row)
    assert result.metrics["eval/loss"] == pytest.approx(total / tokens, rel=1e-3)
    eos_only = {"input_ids": row["input_ids"], "labels": [*[-100] * (len(row["labels"]) - 1), row["labels"][-1]]}
    assert nll(result.policy, eos_only)[0] < share * nll(before, eos_only)[0]
    assert not result.policy.training


def test_the_trainer_leaves_nothing_of_bf16_on_the_policy(
    tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It computes in fp32 again, as the model that was written does, and the native engine can sample from it."""
    result = train(tiny_model_folder, tiny_tokenizer, config(tmp_path / "run", precision="bf16"))
    assert "plain engine" not in capsys.readouterr().err
    written = models.load_policy(str(result.model_folder), tiny_tokenizer)
    ids = torch.tensor([[5, 9, 7, 31, 8, 12]])
    with torch.no_grad():
        assert torch.equal(result.policy(input_ids=ids).logits, written(input_ids=ids).logits)


def test_the_stage_leaves_a_model_a_contract_samples_and_a_record(
    tiny_model_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "shown.jsonl"
    rows = [{"question": f"{d.prompt}{i}", "completion": d.completion} for i in range(5) for d in SHOWN]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = config(
        tmp_path / "sft",
        data=str(path),
        model=str(tiny_model_folder),
        columns={"prompt": "question"},
        held_out=0.3,
        max_prompt_tokens=24,
    )
    result = sft.run(given)
    plain = AutoModelForCausalLM.from_pretrained(result.model_folder)
    trained = dict(result.policy.named_parameters())
    assert all(torch.equal(w, trained[name]) for name, w in plain.named_parameters())
    contract = json.loads((result.model_folder / "contract.json").read_text())
    assert contract["eos_token_ids"] == [tiny_tokenizer.eos_token_id]
    assert contract["pad_token_id"] == tiny_tokenizer.pad_token_id != tiny_tokenizer.eos_token_id
    records = world.records(tmp_path / "sft")
    assert {"train/loss", "grad_norm", "lr"} <= set(records[0])
    assert records[-1]["eval/loss"] == result.metrics["eval/loss"]
    samples = [json.loads(line) for line in (tmp_path / "sft" / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "demonstration", "finished"} <= set(samples[0])
    shown = {row["question"] for row in rows}
    assert {sample["prompt"] for sample in samples} <= shown


def test_only_a_whole_checkpoint_of_the_trainer_is_gone_on_from(tmp_path: Path) -> None:
    assert sft._last_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if whole:
            checkpoint.seal(folder)
    assert sft._last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert sft._last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-10 is damaged: trainer_state\.json is not what was written"):
        sft._last_checkpoint(tmp_path)


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1, 8, 2), (0.5, 8, 1), (3, 7, 5), (0.01, 4, 1)])
def test_steps(epochs: float, rows: int, steps: int, tmp_path: Path) -> None:
    assert sft._steps(config(tmp_path, epochs=epochs), rows) == steps

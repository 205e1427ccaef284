"""Models: what is trained, what is shared, what is written and what is refused, on six tiny architectures."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf import models
from rlhf.config import LastLayers, Lora, Trainable
from rlhf.contract import load as load_contract
from rlhf.types import ConfigError, UserError
from tests.rlhf import tiny
from tests.rlhf.tiny import IDS, difference, logits, save, step

TRAINABLES: list[Trainable] = ["full", "lora", "head", LastLayers(1)]
every_model = pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
odd_ones_too = pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
every_trainable = pytest.mark.parametrize("trainable", TRAINABLES, ids=["full", "lora", "head", "last_layers"])
STACKS = {"llama": "model.", "qwen3": "model.", "gemma2": "model.", "opt": "model.decoder."}
LAYERS = {"gpt2": "transformer.h.", "bloom": "transformer.h."} | {k: v + "layers." for k, v in STACKS.items()}
LAST_NORMS = {
    "gpt2": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    "bloom": ["transformer.ln_f.weight", "transformer.ln_f.bias"],
    "opt": ["model.decoder.project_out.weight"],  # the only thing after the layers of an OPT-350m
}


# ---------------------------------------------------------------- what is trained


def top_layer(name: str) -> str:
    return f"{LAYERS[name]}{tiny.build(name).config.num_hidden_layers - 1}."


@every_model
def test_full_moves_everything(name: str, policy: Callable[..., Any]) -> None:
    model = policy(name, "full")
    moved = step(model)
    still = {n for n, _ in model.named_parameters()} - moved
    assert all("bias" in n for n in still)  # a key's bias cancels in the softmax


@every_model
def test_lora_moves_the_adapters_of_every_layer_and_nothing_else(name: str, policy: Callable[..., Any]) -> None:
    model = policy(name, Lora(lora_rank=4, lora_alpha=8))
    moved = step(model)
    trained = set(models.trainable_parameters(model))
    assert moved <= trained
    assert all("lora_" in weight for weight in trained)
    for layer in range(model.config.num_hidden_layers):
        assert any(f"{LAYERS[name]}{layer}." in weight for weight in moved)


@odd_ones_too
def test_last_layers_moves_the_top_and_what_runs_after_it(name: str, policy: Callable[..., Any]) -> None:
    model = policy(name, LastLayers(1))
    step(model)
    trained = set(models.trainable_parameters(model))
    layer = {n for n, _ in model.named_parameters() if n.startswith(top_layer(name))}
    assert trained == layer | set(LAST_NORMS.get(name, ["model.norm.weight"]))


@odd_ones_too
def test_last_layers_leaves_all_states_below_as_they_were(name: str, policy: Callable[..., Any]) -> None:
    """The frozen trunk's output, which reference, value and reward share, is the same bit for bit after training."""
    model = policy(name, LastLayers(1))

    def trunk_states() -> torch.Tensor:
        _, layers = models.layers_of(model)
        seen: list[torch.Tensor] = []
        hook = layers[-1].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        found = logits(model)
        hook.remove()
        assert found.isfinite().all()
        return seen[0]

    before = trunk_states()
    assert step(model)
    assert torch.equal(before, trunk_states())


@every_model
def test_head_moves_the_lm_head_only_and_unties_it_first(name: str, policy: Callable[..., Any]) -> None:
    before = logits(policy(name))
    model = policy(name, "head")
    assert torch.equal(logits(model), before)
    embeddings = model.get_input_embeddings().weight.clone()
    assert step(model) == {"lm_head.weight"}
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert difference(logits(model), before) > 1e-4


@pytest.mark.parametrize("name", tiny.TIED)
@pytest.mark.parametrize("trainable", ["lora", "head", LastLayers(2)])
def test_a_tied_head_never_moves_frozen_embeddings(name: str, trainable: Trainable, policy: Callable[..., Any]) -> None:
    assert tiny.build(name).config.tie_word_embeddings
    model = policy(name, trainable)
    before = model.get_input_embeddings().weight.clone()
    step(model)
    assert torch.equal(model.get_input_embeddings().weight, before)


@every_model
@every_trainable
def test_a_classifier_always_trains_its_score(name: str, trainable: Trainable, classifier: Callable[..., Any]) -> None:
    model = classifier(name, trainable)
    moved = step(model)
    assert any(weight.startswith("score.") or ".score." in weight for weight in moved)
    if trainable == "head":
        assert moved == {"score.weight"}
    if trainable == LastLayers(1):
        lower = [n for n in moved if n not in models.trainable_parameters(model)]
        assert not lower
        assert any(top_layer(name) in weight for weight in moved)


@every_model
def test_nothing_is_trained_unless_asked(name: str, policy: Callable[..., Any], classifier: Callable[..., Any]) -> None:
    for model in (policy(name), classifier(name)):
        assert models.trainable_parameters(model) == {}
        assert not model.training
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_more_layers_than_there_are(policy: Callable[..., Any]) -> None:
    assert len(models.trainable_parameters(policy("llama", LastLayers(3)))) == 28
    with pytest.raises(ConfigError, match="last_layers is 4, but the model has 3 layers"):
        policy("llama", LastLayers(4))


def test_a_model_without_a_list_of_layers_is_refused_with_advice() -> None:
    class Odd(nn.Module):
        config = tiny.config_of("llama")

    with pytest.raises(UserError, match="no list of 3 layers: use `trainable: full` or `lora`"):
        models.layers_of(Odd())


# ---------------------------------------------------------------- copies


@every_model
@every_trainable
def test_the_reference_starts_equal_stays_put_and_shares_what_is_frozen(
    name: str, trainable: Trainable, policy: Callable[..., Any]
) -> None:
    model = policy(name, trainable)
    reference = models.frozen_copy(model)
    before = logits(model)
    assert torch.equal(logits(reference), before)
    assert step(model)
    assert torch.equal(logits(reference), before)
    assert difference(logits(model), before) > 1e-5
    assert models.trainable_parameters(reference) == {}
    assert models.trainable_parameters(model)  # freezing the copy froze nothing of the original
    theirs = dict(reference.named_parameters())
    for weight_name, weight in model.named_parameters():
        shared = theirs[weight_name].data_ptr() == weight.data_ptr()
        assert shared == (not weight.requires_grad), weight_name


@every_model
@every_trainable
def test_a_model_that_is_only_read_says_the_same_in_bf16(
    name: str, trainable: Trainable, policy: Callable[..., Any]
) -> None:
    """To the bit, with half the memory for what is its own; the model that it shares weights with stays in fp32."""
    model = policy(name, trainable)
    reference = models.frozen_copy(model)
    with models.autocast(torch.device("cpu"), torch.bfloat16):
        before, own = logits(reference), logits(model)
        models.only_read(reference, torch.bfloat16, beside=model)
        assert torch.equal(logits(reference), before)
        assert torch.equal(logits(model), own)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    mine = {id(weight) for weight in model.parameters()}
    theirs = [m for m in reference.modules() if type(m) is torch.nn.Linear and id(m.weight) not in mine]
    tied = reference.get_input_embeddings().weight
    assert all(m.weight.dtype == torch.bfloat16 for m in theirs if m.weight is not tied)
    untouched = policy(name, trainable)
    models.only_read(untouched, torch.float32)
    assert {weight.dtype for weight in untouched.parameters()} == {torch.float32}


def test_what_lies_under_an_adapter_says_the_same_in_bf16(policy: Callable[..., Any]) -> None:
    """To the bit, gradients of the adapter included; what is trained stays in fp32."""
    model = policy("llama", "lora")
    for name, weight in models.trainable_parameters(model).items():
        weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))

    def passed() -> tuple[torch.Tensor, list[torch.Tensor]]:
        with models.autocast(torch.device("cpu"), torch.bfloat16):
            out = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits
        trained = list(models.trainable_parameters(model).values())
        return out, list(torch.autograd.grad(out.float().square().sum(), trained))

    before, gradients = passed()
    models.only_read(model, torch.bfloat16)
    after, same = passed()
    assert torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    linear = {name: m.base_layer.weight.dtype for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert set(linear.values()) == {torch.bfloat16}
    assert {w.dtype for w in models.trainable_parameters(model).values()} == {torch.float32}


def test_what_two_models_have_in_common_is_held_once(policy: Callable[..., Any]) -> None:
    """Only frozen weights: one that is trained would move under the other model."""
    model, other = policy("llama", None), policy("llama", LastLayers(1))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    before = logits(model)
    models.hold_once(model, other)
    assert torch.equal(logits(model), before)
    for name, weight in model.named_parameters():
        twin = other.get_parameter(name)
        assert (weight is twin) == (not twin.requires_grad and name != "model.layers.1.mlp.up_proj.weight"), name


@every_trainable
def test_a_trainable_copy_goes_its_own_way(trainable: Trainable, policy: Callable[..., Any]) -> None:
    model = policy("llama", trainable)
    twin = models.trainable_copy(model)
    assert models.trainable_parameters(twin).keys() == models.trainable_parameters(model).keys()
    before = logits(model)
    assert step(twin)
    assert torch.equal(logits(model), before)
    assert difference(logits(twin), before) > 1e-5


def test_a_full_copy_keeps_its_head_tied(policy: Callable[..., Any]) -> None:
    twin = models.trainable_copy(policy("gpt2", "full"))
    assert twin.lm_head.weight is twin.get_input_embeddings().weight


# ---------------------------------------------------------------- written and read again


@every_model
@every_trainable
def test_a_saved_policy_loads_without_this_project(
    name: str, trainable: Trainable, policy: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = policy(name, trainable)
    step(model)
    folder = save(model, tiny_tokenizer, tmp_path / "model")
    expected = logits(model)
    assert models.is_adapter(folder) == (trainable == "lora")
    assert not models.is_classifier(folder)
    assert difference(logits(AutoModelForCausalLM.from_pretrained(folder)), expected) < 1e-5
    assert difference(logits(models.load_policy(str(folder), tiny_tokenizer)), expected) < 1e-5
    assert load_contract(folder) == models.model_contract(
        model, tiny_tokenizer, max_prompt_tokens=8, max_completion_tokens=8
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_goes_on_training_under_lora_and_is_merged_under_all_else(
    policy: Callable[..., Any], folders: Callable[[str], str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    model = policy("llama", "lora")
    step(model)
    folder = save(model, tiny_tokenizer, tmp_path / "one")
    expected = logits(model)
    assert difference(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected) < 1e-6
    resumed = models.load_policy(str(folder), tiny_tokenizer, trainable="lora")
    assert models.trainable_parameters(resumed).keys() == models.trainable_parameters(model).keys()
    assert step(resumed)
    again = save(resumed, tiny_tokenizer, tmp_path / "two")
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == folders("llama")
    assert difference(logits(models.load_policy(str(again), tiny_tokenizer)), logits(resumed)) < 1e-5
    for trainable in ("full", LastLayers(1), None):
        merged = models.load_policy(str(folder), tiny_tokenizer, trainable=trainable)
        assert not hasattr(merged, "peft_config")
        assert difference(logits(merged), expected) < 1e-5


def test_an_adapter_on_a_base_that_lies_nowhere_is_written_whole(
    policy: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    first = policy("llama", "lora")
    step(first)
    merged = models.load_policy(str(save(first, tiny_tokenizer, tmp_path / "first")), tiny_tokenizer)
    second = models.choose_trainable(merged, "lora")
    step(second)
    folder = save(second, tiny_tokenizer, tmp_path / "second")
    assert not models.is_adapter(folder)
    assert difference(logits(models.load_policy(str(folder), tiny_tokenizer)), logits(second)) < 1e-5
    assert hasattr(second, "peft_config")  # saving merged a copy


@every_model
@every_trainable
def test_a_saved_classifier_loads_without_this_project(
    name: str, trainable: Trainable, classifier: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = classifier(name, trainable)
    step(model)
    folder = save(model, tiny_tokenizer, tmp_path / "model")
    expected = logits(model)
    assert expected.shape == (2, 1)
    assert models.is_classifier(folder)
    assert difference(logits(AutoModelForSequenceClassification.from_pretrained(folder)), expected) < 1e-5
    assert difference(logits(models.load_classifier(str(folder), tiny_tokenizer)), expected) < 1e-5


def test_a_classifier_adapter_of_another_program_is_read(
    folders: Callable[[str], str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folders("llama"), num_labels=1, dtype=torch.float32)
    foreign = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    step(foreign)
    foreign.save_pretrained(tmp_path)
    assert models.is_classifier(tmp_path)
    assert difference(logits(models.load_classifier(str(tmp_path), tiny_tokenizer)), logits(foreign.eval())) < 1e-5
    assert models.load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer.get_vocab()  # the base's


def test_a_new_classifier_stands_on_the_policys_trunk(
    policy: Callable[..., Any], classifier: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    adapted = policy("llama", "lora")
    step(adapted)
    folder = save(adapted, tiny_tokenizer, tmp_path / "policy")
    made = models.load_classifier(str(folder), tiny_tokenizer)
    trunk = models.load_policy(str(folder), tiny_tokenizer).model
    hidden = trunk(input_ids=IDS).last_hidden_state
    assert torch.equal(made.model(input_ids=IDS).last_hidden_state, hidden)
    assert difference(logits(made), made.score(hidden)[:, -1]) < 1e-6
    assert classifier("llama").model.norm.weight.data_ptr() != trunk.norm.weight.data_ptr()


def test_a_new_score_is_drawn_with_its_seed_and_with_variance_one_over_d_plus_one(
    classifier: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = tiny.tokenizer(pad="<pad>")
    wide = tiny.save_new("llama", tmp_path / "wide", tokenizer, hidden_size=2048, num_hidden_layers=1)
    state = torch.random.get_rng_state()
    score = models.load_classifier(str(wide), tokenizer, seed=3).score.weight
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers change
    assert float(score.std()) == pytest.approx((1 / 2049) ** 0.5, rel=0.06)
    one, same, other = (classifier("llama", seed=seed).score.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_saving_over_a_model_replaces_it_whole(policy: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(policy("llama", "lora"), tiny_tokenizer, folder)
    (tmp_path / "model.writing").mkdir()  # of a run that was killed
    save(policy("gpt2"), tiny_tokenizer, folder)
    assert not models.is_adapter(folder)
    assert torch.equal(logits(models.load_policy(str(folder), tiny_tokenizer)), logits(policy("gpt2")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------- the frozen trunk's name


@odd_ones_too
def test_the_trunk_hash_changes_exactly_with_the_frozen_trunk(name: str, policy: Callable[..., Any]) -> None:
    model = policy(name, LastLayers(1))
    depth = model.config.num_hidden_layers
    before = models.trunk_hash(model)
    assert before == models.trunk_hash(policy(name, LastLayers(1)))
    assert before[1] == depth - 1
    assert before[0] not in (None, models.trunk_hash(policy(name, "head"))[0])
    step(model)
    assert models.trunk_hash(model) == before  # the top moved, the trunk did not
    holder, _ = models.layers_of(model)
    for weight_name, weight in holder.named_parameters():
        if not weight.requires_grad:
            other = copy.deepcopy(weight.data)
            weight.data.view(-1)[-1] += 1.0
            assert models.trunk_hash(model) != before, weight_name
            weight.data = other
    assert models.trunk_hash(model) == before


@odd_ones_too
def test_policy_and_classifier_of_one_checkpoint_share_their_trunk(
    name: str, policy: Callable[..., Any], classifier: Callable[..., Any]
) -> None:
    for trainable in (LastLayers(1), "head"):
        assert models.trunk_hash(policy(name, trainable)) == models.trunk_hash(classifier(name, trainable))


@pytest.mark.parametrize("trainable", ["full", "lora", LastLayers(3)])
def test_where_the_lowest_layer_is_trained_there_is_no_trunk(trainable: Trainable, policy: Callable[..., Any]) -> None:
    assert models.trunk_hash(policy("llama", trainable)) == (None, 0)


# ---------------------------------------------------------------- pad and EOS


@pytest.fixture
def padless(tmp_path: Path) -> tuple[str, Any]:
    """A GPT-2 as it is on the hub: no pad token, and one row of embeddings for each token."""
    tokenizer = tiny.tokenizer(eos="<|endoftext|>")
    folder = tiny.save_new("gpt2", tmp_path / "gpt2", tokenizer, vocab_size=257, pad_token_id=None, eos_token_id=256)
    return str(folder), models.load_tokenizer(str(folder))


def test_an_added_pad_gets_rows_that_change_no_logit_and_are_the_same_at_each_load(padless: tuple[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder, tokenizer = padless
    assert tokenizer.pad_token_id == 257
    model = models.load_policy(folder, tokenizer)
    ids = IDS.clamp(max=255)
    old = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    new = model(input_ids=ids).logits
    torch.testing.assert_close(new[..., :257], old, rtol=0, atol=1e-5)  # other kernels, other last bits
    torch.testing.assert_close(new[..., 257], old.mean(-1), rtol=0, atol=1e-5)  # no more likely than the average token
    again = models.load_policy(folder, tokenizer)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 258


def test_an_untied_head_gets_its_own_mean_row(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(eos="<|endoftext|>")
    folder = tiny.save_new("qwen3", tmp_path / "m", tokenizer, vocab_size=257, pad_token_id=None, eos_token_id=256)
    model = models.load_policy(str(folder), models.load_tokenizer(str(folder)))
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert len(table) == 258
        assert torch.equal(table[257], table[:257].mean(0))
    assert model.lm_head.weight is not model.get_input_embeddings().weight


@every_trainable
def test_a_policy_with_an_added_pad_loads_without_this_project(
    trainable: Trainable, padless: tuple[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source, tokenizer = padless
    model = models.load_policy(source, tokenizer, trainable=trainable)
    ids = IDS.clamp(max=255)
    model(input_ids=ids).logits.pow(2).mean().backward()
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1).step()
    folder = save(model, tokenizer, tmp_path / "saved")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        ours = models.load_policy(str(folder), models.load_tokenizer(str(folder)))(input_ids=ids).logits
    assert difference(plain, expected) < 1e-5
    assert difference(ours, expected) < 1e-5


@every_model
def test_every_place_that_names_a_pad_agrees(
    name: str, policy: Callable[..., Any], classifier: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    for model in (policy(name), classifier(name)):
        model.config.pad_token_id = model.get_input_embeddings().padding_idx = tiny_tokenizer.eos_token_id
        models.fix_padding(model, tiny_tokenizer)
        assert model.config.pad_token_id == model.get_input_embeddings().padding_idx == tiny_tokenizer.pad_token_id
        assert model.config.get_text_config().pad_token_id == tiny_tokenizer.pad_token_id
    assert policy(name).generation_config.pad_token_id == tiny_tokenizer.pad_token_id


def test_the_embedding_of_eos_is_trained_though_the_config_called_it_the_pad(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """SmolLM2: pad == EOS in the config, and padding_idx takes away the gradient."""
    eos = tiny_tokenizer.eos_token_id
    folder = tiny.save_new("qwen3", tmp_path / "m", tiny_tokenizer, pad_token_id=eos)
    model = models.load_policy(str(folder), tiny_tokenizer, trainable="full")
    model(input_ids=torch.tensor([[5, eos, 7]])).logits[:, -1].sum().backward()
    assert model.get_input_embeddings().weight.grad[eos].abs().sum() > 0


def test_every_eos_of_the_generation_config_counts(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Qwen: the tokenizer's pad is one of the model's EOS."""
    tokenizer = tiny.tokenizer("<|im_end|>", eos="<|im_end|>", pad="<|endoftext|>")
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = tiny.build("qwen3")
    model.generation_config.eos_token_id = [end, text_end]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id not in (end, text_end)
    policy = models.load_policy(str(tmp_path), loaded)
    assert models.eos_token_ids(policy, loaded) == tuple(sorted((end, text_end)))
    contract = models.model_contract(policy, loaded, max_prompt_tokens=1, max_completion_tokens=1)
    assert contract.eos_token_ids == tuple(sorted((end, text_end)))
    adapter = save(models.choose_trainable(policy, "lora"), loaded, tmp_path / "adapter")
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer_config.json").unlink()
    assert models.load_tokenizer(str(adapter)).pad_token_id not in (end, text_end)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("where", "avx", "amx", "cuda", "expected"),
    [
        ("cpu", True, False, False, torch.bfloat16),
        ("cpu", False, True, False, torch.bfloat16),
        ("cpu", False, False, True, torch.float32),
        ("cuda", False, False, True, torch.bfloat16),
        ("cuda", True, True, False, torch.float32),
    ],
)
def test_auto_precision_asks_the_hardware(
    where: str, avx: bool, amx: bool, cuda: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: cuda or including_emulation)
    assert models.compute_dtype("auto", torch.device(where)) == expected
    assert models.compute_dtype("fp32", torch.device(where)) == torch.float32
    assert models.compute_dtype("bf16", torch.device(where)) == torch.bfloat16


def test_autocast_computes_in_bf16_only_when_told_and_never_touches_the_weights(policy: Callable[..., Any]) -> None:
    model = policy("llama")
    here = torch.device("cpu")
    with models.autocast(here, torch.bfloat16):
        assert logits(model).dtype == torch.bfloat16
        with models.autocast(here, torch.float32):
            assert logits(model).dtype == torch.float32
    with models.autocast(here, torch.float32):
        assert torch.equal(logits(model), model(input_ids=IDS).logits)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}

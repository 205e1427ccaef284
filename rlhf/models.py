"""Where models come from, which of their weights are trained, and how they are written out again.

Weights are loaded and trained in fp32 and computed in bf16 where the machine is fast at it (`autocast`). What comes out
are ordinary Hugging Face or PEFT folders.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf import attention
from rlhf import contract as contracts
from rlhf.config import LastLayers, Lora, Precision, Trainable
from rlhf.contract import Contract
from rlhf.model_files import base_of, has_tokenizer, is_adapter, is_classifier, local_source, token_ids
from rlhf.text import contract_of, ensure_pad
from rlhf.types import ConfigError, ContractError, UserError


def device() -> torch.device:
    """The accelerator where there is one (this process's own where a launcher started several), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", int(local_rank) % torch.cuda.device_count()) if local_rank else torch.device("cuda")


def compute_dtype(precision: Precision, where: torch.device) -> torch.dtype:
    """The type to compute in: what was asked for, or bf16 where the hardware multiplies it faster than fp32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(where: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Compute in `dtype` inside the block; fp32 means no casting at all."""
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def casting_once(where: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block all passes in `dtype` share one conversion of trained weights, which must not change meanwhile.

    `autocast` forgets what it converted when the outermost block ends, which is this one; nothing else is cast in it.
    """
    with autocast(where, dtype), autocast(where, torch.float32):
        yield


# ---------------------------------------------------------------- loading


def load_tokenizer(source: str, *, trusting: bool = False) -> Any:
    """The tokenizer of any model source, with left padding and a pad token that is no EOS.

    An adapter that brings no tokenizer has that of its base. Raises ContractError where the model's `contract.json`
    says that it was trained with another one, unless `trusting`.
    """
    from transformers import AutoTokenizer, GenerationConfig

    folder = local_source(source)
    base = base_of(folder)
    tokenizer = _load(AutoTokenizer.from_pretrained, folder if has_tokenizer(folder) else base, source)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} names no EOS token, so no completion could ever end: set eos_token")
    try:
        eos = GenerationConfig.from_pretrained(str(base)).eos_token_id
    except OSError:
        eos = None
    ensure_pad(tokenizer, token_ids(eos))
    if not trusting:
        _check_contract(tokenizer, folder, source)
    return tokenizer


def load_policy(source: str, tokenizer: Any, *, trainable: Trainable | None = None) -> Any:
    """A causal language model in fp32 and evaluation mode, with its trainable weights chosen.

    An adapter folder goes on training its own adapter under `lora`, and is merged into its base under all else.
    `trainable=None` freezes everything.
    """
    from transformers import AutoModelForCausalLM

    folder = local_source(source)
    if is_classifier(folder):  # transformers would load it, with a random or misplaced LM head
        raise UserError(f"{source} is a reward model, which writes no text: give a language model")
    model = _load(AutoModelForCausalLM.from_pretrained, base_of(folder), source, dtype=torch.float32)
    fix_padding(model, tokenizer)
    attention.choose(model)
    if is_adapter(folder):
        from peft import PeftModel

        keep = trainable == "lora" or isinstance(trainable, Lora)
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=keep)
        if keep:
            return model.eval()
        model = _merged(model)
    return choose_trainable(model, trainable).eval()


def load_classifier(source: str, tokenizer: Any, *, trainable: Trainable | None = None, seed: int = 0) -> Any:
    """A sequence classifier with one score: a trained reward model, or a new head on a language model's trunk.

    A new head is drawn from N(0, 1/(d + 1)) with `seed`, as in Stiennon et al. 2020.
    """
    folder = local_source(source)
    if is_classifier(folder):
        model = _load_trained_classifier(folder)
    else:
        model = _classifier_from_policy(load_policy(source, tokenizer), seed)
    fix_padding(model, tokenizer)
    attention.choose(model)
    return choose_trainable(model, trainable).eval()


def fix_padding(model: Any, tokenizer: Any) -> None:
    """Tell the model about the pad token: in its configs, in its embedding, and by rows for a token that was added.

    Added rows are the mean of the others: an added token is then about as unlikely as any, and the same at each load.
    """
    pad = tokenizer.pad_token_id
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _fill_with_mean(model.get_input_embeddings(), rows)
        _fill_with_mean(model.get_output_embeddings(), rows)
        model.config._name_or_path = ""  # it is no longer the model that lies there: see save_model
    model.get_input_embeddings().padding_idx = pad
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = pad


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(sorted({tokenizer.eos_token_id, *token_ids(named)}))


# ---------------------------------------------------------------- what is trained


def choose_trainable(model: Any, trainable: Trainable | None) -> Any:
    """Mark what is trained (see `rlhf.config.Trainable`); returns the model, wrapped by PEFT under `lora`.

    A LM head that shares the embeddings' weights is frozen with the layers, or untied when it is itself what is
    trained: otherwise the embeddings below the frozen layers would move. Raises ConfigError for more layers than exist.
    """
    if trainable == "lora" or isinstance(trainable, Lora):
        return _with_adapter(model, trainable if isinstance(trainable, Lora) else Lora())
    model.requires_grad_(trainable == "full")
    if trainable == "head":
        _trainable_head(model).requires_grad_(True)
    elif isinstance(trainable, LastLayers):
        for module in _top_modules(model, trainable.last_layers):
            module.requires_grad_(True)
        if hasattr(model, "score"):
            model.score.requires_grad_(True)
    return model


def frozen_copy(model: nn.Module) -> Any:
    """The reference: a copy of the weights that training will change, sharing those that it will not.

    One rule for every `trainable`: a whole copy under `full`, the original top layers on the shared trunk under
    `last_layers`, the adapter as it was on the shared base under `lora`.
    """
    twin = trainable_copy(model)
    return twin.requires_grad_(False).eval()


def trainable_copy(model: nn.Module) -> Any:
    """A second model that trains the same weights from here on, sharing the frozen ones."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})


@torch.no_grad()
def hold_once(model: nn.Module, other: nn.Module) -> None:
    """Let every weight of `model` that equals the frozen one of the same name in `other` be that very weight.

    Where one of them is in bf16 (`only_read`), in bf16: then neither is multiplied in more.
    """
    theirs = {name: w for name, w in other.named_parameters(remove_duplicate=False) if not w.requires_grad}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        same = theirs.get(name)
        if same is not None and same.shape == weight.shape and torch.equal(same.to(weight.dtype), weight):
            holder, _, own = name.rpartition(".")
            setattr(model.get_submodule(holder), own, same)


def only_read(
    model: nn.Module, dtype: torch.dtype, *, but: nn.Module | None = None, beside: nn.Module | None = None
) -> Any:
    """The same model with the weights of its linear layers in `dtype`, in which `autocast` multiplies them anyway.

    For a model that is never trained, or of which adapters are: half the memory, and nothing to convert in each pass,
    with outputs equal to the bit. What is trained, what another kind of module reads as well (the embeddings), the
    module `but`, and what the model `beside` it holds too stay as they are. All that is its own is copied: mapped from
    a file, one weight would keep all of that.
    """
    if dtype == torch.float32:
        return model
    theirs = {id(weight) for weight in beside.parameters()} if beside else set()
    others = (module for module in model.modules() if type(module) is not nn.Linear or module is but)
    in_fp32 = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    for weight in model.parameters():
        if id(weight) not in theirs and not weight.requires_grad:
            weight.data = weight.data.to(torch.float32 if id(weight) in in_fp32 else dtype, copy=True)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that an optimiser step changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def check_context(model: Any, longest: int, what: str) -> None:
    """Raise ConfigError where `longest` tokens are more than the model can read at once."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigError(
            f"{what} is {longest} tokens long, but the model's context is {context}: lower max_prompt_tokens or "
            f"max_completion_tokens, or choose another model"
        )


def keeps_logits(model: Any) -> bool:
    """Whether the model can run its head on the last positions only (`logits_to_keep`)."""
    inner = model.get_base_model() if _is_peft(model) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def layers_of(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The stack of transformer layers and the module that holds it."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, child
    raise UserError(f"{type(model).__name__} has no list of {depth} layers: use `trainable: full` or `lora` with it")


def frozen_depth(model: Any) -> int:
    """How many of the lowest layers are frozen, with all that runs below them."""
    if _any_trainable(model.get_input_embeddings()):
        return 0
    _, layers = layers_of(model)
    return next((i for i, layer in enumerate(layers) if _any_trainable(layer)), len(layers))


def trunk_hash(model: Any) -> tuple[str | None, int]:
    """Fingerprint of the frozen lower layers and how many there are; (None, 0) where the lowest layer is trained."""
    depth = frozen_depth(model)
    if depth == 0:
        return None, 0
    holder, layers = layers_of(model)
    upper = {id(weight) for layer in layers[depth:] for weight in layer.state_dict(keep_vars=True).values()}
    sha = hashlib.sha256()
    for weight in holder.state_dict(keep_vars=True).values():  # positions and norms before the layers included
        if id(weight) not in upper and not weight.requires_grad:
            sha.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16], depth


# ---------------------------------------------------------------- writing


def save_model(model: Any, tokenizer: Any, folder: Path, *, contract: Contract) -> None:
    """Write an ordinary Hugging Face or PEFT folder with its contract, aside first and then renamed.

    A reward model is always written whole, its adapter merged: transformers alone would load it without the head.
    So is an adapter on a base that lies in no folder, because it was merged in memory.
    """
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    if _is_peft(model) and not writes_adapter_only(model):
        model = _merged(copy.deepcopy(model))
    try:
        # no config.json beside an adapter: it would keep transformers from looking for the base
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        contract.save(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def writes_adapter_only(model: Any) -> bool:
    """Whether `save_model` leaves the model's frozen weights where they were loaded from."""
    return _is_peft(model) and not hasattr(model, "score") and bool(model.get_base_model().config._name_or_path)


def model_contract(model: Any, tokenizer: Any, *, max_prompt_tokens: int, max_completion_tokens: int) -> Contract:
    """The text contract of a model, its frozen trunk included."""
    from dataclasses import replace

    text = contract_of(
        tokenizer,
        eos_token_ids=eos_token_ids(model, tokenizer),
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
    )
    name, depth = trunk_hash(model)
    return replace(text, trunk_hash=name, trunk_depth=depth)


# ---------------------------------------------------------------- parts


def _check_contract(tokenizer: Any, folder: Path, source: str) -> None:
    """Refuse a tokenizer or template that is no longer the one that the model beside it was trained with."""
    known = contracts.load(folder)
    if known is None:
        return
    limits = {"max_prompt_tokens": known.max_prompt_tokens, "max_completion_tokens": known.max_completion_tokens}
    now = contract_of(tokenizer, eos_token_ids=known.eos_token_ids, **limits)
    if not now.shares_text_with(known):
        raise ContractError(
            f"{source}: the tokenizer beside this model is not the one it was trained with ({now.tokenizer_hash}, but "
            f"contract.json says {known.tokenizer_hash}): put that tokenizer's files back, or train the model again"
        )
    contracts.check_same_template(
        known,
        now,
        mine_name=f"the contract.json of {source}",
        theirs_name="the tokenizer beside it",
        advice="put that chat template back, or train the model again",
    )


def _load(loader: Any, folder: Path, source: str, **options: Any) -> Any:
    from safetensors import SafetensorError

    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        inside = folder / "model"
        hint = f"did you mean {inside}?" if inside.is_dir() else "give the folder that save_pretrained wrote"
        raise UserError(f"{source} holds no model, there is no config.json in it: {hint}")
    try:
        return loader(str(folder), **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        where = "" if folder.is_dir() else ", which is no folder here, cannot be had from the hub and"
        advice = "copy the folder again" if folder.is_dir() else "give a folder, a hub id or a .gguf file"
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UserError(f"{source}{where} cannot be loaded as a model: {reason}: {advice}") from error


@torch.no_grad()
def _fill_with_mean(table: Any, old_rows: int) -> None:
    """Give the rows after the first `old_rows` of an embedding or LM head the mean of those."""
    for weight in table.parameters() if table is not None else ():
        weight[old_rows:] = weight[:old_rows].mean(0)


def _load_trained_classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    loader = AutoModelForSequenceClassification.from_pretrained
    adapter = is_adapter(folder)
    model = _load(loader, base_of(folder), str(folder), dtype=torch.float32, **({"num_labels": 1} if adapter else {}))
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise UserError(
            f"{folder} is a classifier with {model.config.num_labels} labels, but a reward model is a decoder with one "
            "score: train one with `rlhf reward`, or wrap this one in a function and pass it as `module:function`"
        )
    if adapter:
        from peft import PeftModel

        model = _merged(PeftModel.from_pretrained(model, str(folder)))
    return model


def _classifier_from_policy(policy: Any, seed: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with torch.random.fork_rng():
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    classifier.base_model.load_state_dict(policy.base_model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    width = classifier.score.in_features
    classifier.score.weight.data = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
    classifier.config._name_or_path = policy.config._name_or_path
    return classifier


def _merged(model: Any) -> Any:
    """The base with its adapter folded in; it lies in no folder any more, and says so by an empty name."""
    model = model.merge_and_unload()
    model.config._name_or_path = ""
    return model


def _with_adapter(model: Any, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    config = LoraConfig(
        task_type=task, r=lora.lora_rank, lora_alpha=lora.lora_alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    return get_peft_model(model, config)


def _trainable_head(model: Any) -> nn.Module:
    if hasattr(model, "score"):
        return model.score
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return head


def _top_modules(model: Any, count: int) -> list[nn.Module]:
    """The top `count` layers, and what runs after them in their stack: the last norm.

    What runs is asked of the model: BLOOM has a norm, and OPT a projection, beside the layers that run before them.
    """
    holder, layers = layers_of(model)
    if count > len(layers):
        raise ConfigError(f"last_layers is {count}, but the model has {len(layers)} layers: give at most that many")
    ran = _running_order(model, [*holder.children(), layers[-1]])
    top = ran.index(layers[-1])
    return [*layers[-count:], *(module for module in ran[top + 1 :] if module not in ran[:top])]


@torch.no_grad()
def _running_order(model: Any, modules: list[nn.Module]) -> list[nn.Module]:
    """These modules in the order in which the model calls them."""
    order: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: order.append(module)) for module in modules]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _any_trainable(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")

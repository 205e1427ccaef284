"""Tiny random models of several architectures, for what must hold on each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE | {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", LLAMA_LIKE | {"num_hidden_layers": 2, "tie_word_embeddings": False, "head_dim": 8}),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 384, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "eos_token_id": 1}
        | {"bos_token_id": 1, "pad_token_id": 0},
    ),
    "opt": (
        "OPTConfig",
        COMMON
        | {"num_hidden_layers": 3, "ffn_dim": 48, "max_position_embeddings": 256, "word_embed_proj_dim": 16}
        | {"do_layer_norm_before": False, "dropout": 0.0},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 384, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 1},
    ),
}
IDS = torch.tensor([[5, 9, 200, 7, 31, 8], [77, 3, 12, 300, 4, 2]])
TIED = ("llama", "gemma2", "gpt2", "opt", "bloom")


def config_of(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model of this architecture."""
    import transformers

    kind, settings = ARCHITECTURES[name]
    return getattr(transformers, kind)(**(settings | changes))


def build(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny random causal language model in evaluation mode. Weights are larger than usual, so that outputs differ."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name, **changes), dtype=torch.float32)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()


def save_new(name: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """The same as a folder with its tokenizer."""
    build(name, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer(
    *specials: str, eos: str = "<eos>", pad: str | None = None, bos: str | None = None, merge: str | None = None
) -> Any:
    """A tokenizer of single bytes and these specials; `merge` (two characters) makes a token of those.

    With `bos` it puts that before every text, as Llama's does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merge = merge.replace(" ", "Ġ") if merge else None
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *([merge] if merge else [])]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(merge[0], merge[1])] if merge else []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict.fromkeys([*([bos] if bos else []), eos, *([pad] if pad else []), *specials])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad, bos_token=bos)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model makes of IDS."""
    return model(input_ids=IDS).logits


def step(model: Any) -> set[str]:
    """One optimiser step on all weights that carry a gradient; the names of those that moved."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimiser = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    for _ in range(2):  # the A matrices of LoRA move only once the B matrices have
        model(input_ids=IDS).logits.pow(2).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return {name for name, weight in model.named_parameters() if not torch.equal(before[name], weight)}


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save it as a stage does, contract included."""
    from rlhf import models

    contract = models.model_contract(model, tokenizer, max_prompt_tokens=8, max_completion_tokens=8)
    models.save_model(model, tokenizer, folder, contract=contract)
    return folder


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest one."""
    return float((one - other).abs().max())

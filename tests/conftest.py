"""Shared fixtures: a tiny random model made on the spot (no downloads), and a process that cannot import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.progress import quiet
from tests import postgres as postgres_server

# Before torch is imported anywhere: tiny models are fastest on one thread, and their sums are then always the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
quiet()

ROOT = Path(__file__).resolve().parents[1]
PAD, EOS = "<pad>", "<eos>"
CORPUS = (
    "the film is a good and funny story of a man and his dog .",
    "it is not a bad movie , but the plot is too long and the end is sad .",
    "a dull , slow and boring film that you will forget before the lights go on .",
    "one of the best films of the year : warm , clever and very well acted .",
    "The cast is great. The script isn't. I laughed twice, and both times I was ashamed of it!",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCK_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "trl", "peft", "accelerate"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 tokens; `<pad>` is not `<eos>`, and there is no chat template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_chat_tokenizer() -> Any:
    """The same with a chat template."""
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """An ordinary Hugging Face folder of a random Llama with 3 layers: usable as `--model`. Do not write into it."""
    return make_model_folder(tmp_path_factory.mktemp("tiny") / "model", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_chat_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_chat_tokenizer: Any) -> Path:
    """The same model with a chat template."""
    return make_model_folder(tmp_path_factory.mktemp("tiny_chat") / "model", tiny_chat_tokenizer)


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.Cluster]:
    """A PostgreSQL server for the session; skipped where there is none, a failure in CI."""
    with postgres_server.cluster() as cluster:
        yield cluster


@pytest.fixture
def postgres_url(postgres: postgres_server.Cluster) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    with postgres.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a test's own, new label store is to be: what uses this runs on both databases."""
    return str(tmp_path / "labels.db") if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture(scope="session")
def without_torch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`without_torch("import x")` runs code in a process where importing torch, or what needs it, raises."""

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BLOCK_TORCH + code, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    return run


def make_tokenizer(chat_template: str | None = None) -> Any:
    """A new byte-level tokenizer, the same at each call."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    fast.chat_template = chat_template
    return fast


def make_model_folder(
    folder: Path, tokenizer: Any, *, seed: int = 0, hidden_size: int = 32, layers: int = 3, tied: bool = True
) -> Path:
    """Save a random Llama with its tokenizer, and return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Fixtures for tests on several architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from tests.rlhf import tiny

# A busy machine is no failure, and the same commit is tested on the same examples everywhere.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], str]:
    """`folders("gpt2")`: a folder with a tiny model of this architecture. Do not write into it."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> str:
        path = root / name
        return str(path if path.is_dir() else tiny.save_new(name, path, tiny_tokenizer))

    return folder


@pytest.fixture
def policy(folders: Callable[[str], str], tiny_tokenizer: Any) -> Callable[..., Any]:
    """`policy("gpt2", "lora")`: a policy of this architecture with what is trainable."""
    from rlhf import models

    return lambda name, trainable=None: models.load_policy(folders(name), tiny_tokenizer, trainable=trainable)


@pytest.fixture
def classifier(folders: Callable[[str], str], tiny_tokenizer: Any) -> Callable[..., Any]:
    """The same as a new classifier."""
    from rlhf import models

    def load(name: str, trainable: Any = None, **more: Any) -> Any:
        return models.load_classifier(folders(name), tiny_tokenizer, trainable=trainable, **more)

    return load

"""The house's promises about imports: the layers, what starts without torch, and what the maths may use."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rlhf", "reward_models", "labeling_ui", "experiments")
TORCH_FREE = [
    "rlhf.cli",
    "rlhf.comparison",
    "rlhf.config",
    "rlhf.contract",
    "rlhf.data",
    "rlhf.data_command",
    "rlhf.fingerprint",
    "rlhf.pipeline",
    "rlhf.progress",
    "rlhf.renewal",
    "rlhf.report",
    "rlhf.settings",
    "rlhf.store",
    "rlhf.tracking",
    "rlhf.types",
    "labeling_ui.service",
    "labeling_ui.simulate",
    "labeling_ui.app",
    "labeling_ui.stage",
    "experiments.sentiment.data",
    "experiments.sentiment.utility",
]
PURE = ("rlhf/ops.py", "rlhf/losses.py", "reward_models/losses.py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or anywhere below."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_import_linter_finds_every_layer_kept() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_module_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = {name for layer in contracts[0]["layers"] for name in layer.split(" | ")}
    modules = {f"rlhf.{path.stem}" for path in (ROOT / "rlhf").glob("[!_]*.py")}
    assert modules | {"rlhf.generation", "reward_models", "labeling_ui", "experiments"} == listed


@pytest.mark.parametrize("module", TORCH_FREE)
def test_starts_where_torch_cannot_be_imported(
    module: str, without_torch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = without_torch(f"import {module}")
    assert done.returncode == 0, done.stderr


def test_the_process_without_torch_really_has_none(
    without_torch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert "torch must not be imported here" in without_torch("import torch").stderr
    assert "transformers must not be imported here" in without_torch("from transformers import AutoTokenizer").stderr


@pytest.mark.parametrize("file", PURE)
def test_the_maths_imports_torch_and_nothing_else(file: str) -> None:
    allowed = {"torch", "math", "jaxtyping", "rlhf.ops"}
    standard = sys.stdlib_module_names
    assert [
        name for name in imports(ROOT / file) if name not in allowed and name.split(".")[0] not in {"torch", *standard}
    ] == []


def test_only_tracking_imports_wandb() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    users = {
        path.relative_to(ROOT).as_posix() for path in files if any(n.split(".")[0] == "wandb" for n in imports(path))
    }
    assert len(files) > 20
    assert users == {"rlhf/tracking.py"}


def test_importing_the_package_imports_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, rlhf; print([m for m in sys.modules if m.startswith('rlhf.')])"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"

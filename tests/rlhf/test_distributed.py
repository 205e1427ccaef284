"""Two processes compute what one does: same samples, same losses, same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.run_folder import read_records

SCRIPT = Path(__file__).with_name("two_processes.py")
ROOT = Path(__file__).resolve().parents[2]


def run(model: Path, output: Path, world: int) -> Path:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if world == 2 else []
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
    }
    command = [sys.executable, *launcher, str(SCRIPT), str(model), str(output), str(world)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def outputs(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run in one process and in two."""
    root = tmp_path_factory.mktemp("processes")
    return run(tiny_model_folder, root / "one", 1), run(tiny_model_folder, root / "two", 2)


def test_there_really_were_two_processes(outputs: tuple[Path, Path]) -> None:
    worlds = [json.loads((folder / "world.json").read_text(encoding="utf-8"))["world"] for folder in outputs]
    assert worlds == [1, 2]


def test_losses_and_metrics_are_equal(outputs: tuple[Path, Path]) -> None:
    one, two = (read_records(folder / "metrics.jsonl") for folder in outputs)
    assert len(one) == len(two) == 4
    of_this_process = "gen/distinct2"
    for left, right in zip(one, two, strict=True):
        for name, value in left.items():
            if not name.startswith("timing/") and name != of_this_process:
                assert right[name] == pytest.approx(value, abs=1e-5), (left["step"], name)


def test_weights_are_equal_and_moved(outputs: tuple[Path, Path], tiny_model_folder: Path) -> None:
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in outputs)
    start = load_file(tiny_model_folder / "model.safetensors")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
    assert max(float((one[name] - start[name]).abs().max()) for name in start) > 1e-3

"""Two processes compute what one does, with whole weights and with sharded ones, and none is left waiting."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from rlhf import processes, sharding
from rlhf.run_folder import read_records
from rlhf.types import ConfigError
from tests.rlhf import two_processes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "accelerate"
BOTH = ("", "_sharded")
"""Whole and sharded weights."""


def launch(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU, by torchrun; nothing but the launcher says that there are two."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment = known | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def environment_of(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file config` tells the processes that it starts."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "-m", "rlhf"])
    arguments, _, _ = _validate_launch_command(arguments)
    told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def alone(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs in one process."""
    root = tmp_path_factory.mktemp("one")
    with torch.random.fork_rng():
        two_processes.main(str(tiny_model_folder), str(root), "{}")
    return root


@pytest.fixture(scope="module")
def shared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs in two processes."""
    root = tmp_path_factory.mktemp("two")
    sharded = json.dumps(environment_of(CONFIGS / "fsdp2.yaml"))
    done = launch(str(Path(two_processes.__file__)), str(tiny_model_folder), str(root), sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def told(root: Path, run: str) -> list[list[dict[str, Any]]]:
    """What each process says of a run, and of its repetition."""
    return [json.loads((root / run / f"process_{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run leaves: of a model, or of an adapter."""
    return load_file(next((run / "model").glob("*.safetensors")))


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, atol=tolerance, rtol=0)


# ---------------------------------------------------------------- the same as one process


def test_there_really_were_two_processes(shared: Path, alone: Path) -> None:
    for run in [path for path in shared.iterdir() if not path.name.endswith("_halfway")]:
        assert {part["world"] for parts in told(shared, run.name) for part in parts} == {2}
    assert json.loads((alone / "full" / "process_0.json").read_text(encoding="utf-8"))[0]["world"] == 1


@pytest.mark.parametrize("weights", BOTH)
@pytest.mark.parametrize("run", two_processes.COMPARED)
def test_losses_and_metrics_are_those_of_one_process(alone: Path, shared: Path, run: str, weights: str) -> None:
    one, two = (read_records(folder / "metrics.jsonl") for folder in (alone / run, shared / (run + weights)))
    assert len(one) == len(two) >= 3
    of_this_process = "gen/distinct2"
    for left, right in zip(one, two, strict=True):
        for name, value in left.items():
            if not name.startswith("timing/") and name != of_this_process:
                assert right[name] == pytest.approx(value, abs=1e-5), (left["step"], name)


@pytest.mark.parametrize("weights", BOTH)
@pytest.mark.parametrize("run", two_processes.COMPARED)
def test_weights_are_those_of_one_process(alone: Path, shared: Path, run: str, weights: str) -> None:
    assert_same_weights(alone / run, shared / (run + weights), 1e-5)
    one, two = (load_file(root / "value" / "value.safetensors") for root in (alone / run, shared / (run + weights)))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


def test_the_weights_moved(alone: Path, tiny_model_folder: Path) -> None:
    start = load_file(tiny_model_folder / "model.safetensors")
    for run in ("full", "last_layers"):
        after = weights(alone / run)
        assert max(float((after[name] - start[name]).abs().max()) for name in start) > 1e-3
    assert max(float(w.abs().max()) for name, w in weights(alone / "lora").items() if "lora_B" in name) > 1e-4


# ---------------------------------------------------------------- sharded weights


@pytest.mark.parametrize("run", two_processes.SHARED)
def test_every_trained_weight_and_gradient_is_sharded(shared: Path, run: str) -> None:
    for first, second in zip(*told(shared, f"{run}_sharded"), strict=True):
        count = len(first["sharded"])
        assert count > 10
        assert sum(a or b for a, b in zip(first["sharded"], second["sharded"], strict=True)) == count
        assert sum(first["sharded"]) >= count - 2  # the one row of the value head lies in one process
        assert len(first["gradients_sharded"]) == count
        assert all(first["gradients_sharded"])
    assert not any(sum(part["sharded"]) for part in told(shared, run)[0])


def test_a_sharded_run_leaves_ordinary_folders(shared: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    assert all(part["whole"] for parts in told(shared, "full_sharded") for part in parts)
    for run in ("full", "last_layers"):
        model = AutoModelForCausalLM.from_pretrained(shared / f"{run}_sharded" / "model")
        assert type(model).__name__ == model.config.architectures[0] == "LlamaForCausalLM"
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    adapted = AutoPeftModelForCausalLM.from_pretrained(shared / "lora_sharded" / "model")
    assert type(adapted.get_base_model()).__name__ == "LlamaForCausalLM"


def test_a_sharded_run_goes_on_in_one_process(
    alone: Path, shared: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared / "stopped_sharded_halfway", tmp_path / "run")
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2
    two_processes.perform(str(tiny_model_folder), two_processes.COMPARED["full"], tmp_path / "run")
    assert_same_weights(alone / "full", tmp_path / "run", 1e-5)


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("FSDP_VERSION", "1", "fsdp_version is 1"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward is False"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing is True"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is true"),
    ],
)
def test_sharding_that_would_be_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, setting: str
) -> None:
    two: Any = SimpleNamespace(num_processes=2)
    assert not sharding.is_wanted(two)
    for known, said in environment_of(CONFIGS / "fsdp2.yaml").items():
        monkeypatch.setenv(known, said)
    assert sharding.is_wanted(two)
    assert not sharding.is_wanted(SimpleNamespace(num_processes=1))  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=setting):
        sharding.is_wanted(two)


# ---------------------------------------------------------------- processes agree


@pytest.mark.parametrize("weights", BOTH)
def test_sigterm_at_one_process_stops_both_after_the_step_and_both_go_on(shared: Path, weights: str) -> None:
    for stopped, resumed in told(shared, f"stopped{weights}"):
        assert stopped["error"] == "Stopped"
        assert "step 2 of 4 is saved" in stopped["message"]
        assert "error" not in resumed
    assert_same_weights(shared / f"full{weights}", shared / f"stopped{weights}", 0)


@pytest.mark.parametrize("weights", BOTH)
def test_a_gradient_that_is_nan_in_one_process_is_left_out_in_both(shared: Path, weights: str) -> None:
    (first,), (second,) = told(shared, f"nan_gradient{weights}")
    assert first["steps"] == second["steps"] == 8
    assert first["norms"] == second["norms"]
    skipped = [record["val/skipped_steps"] for record in read_records(shared / f"nan_gradient{weights}/metrics.jsonl")]
    assert skipped == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        # one word each, from the one prompt of three that fits: 5 rows a process in micro-batches of 3 and 2
        ("short", 2 * 2 * 2),
        # 4 rows a process are one micro-batch, of which two minibatches cannot be dealt
        ("few_micro_batches", 2 * 2 * 1),
        # stopped after the first of two epochs
        ("target_kl", 2 * 1 * 2),
    ],
)
def test_processes_take_the_same_number_of_steps(shared: Path, run: str, steps: int) -> None:
    for (part,) in told(shared, run):
        assert "error" not in part, part
        assert part["steps"] == steps


@pytest.mark.parametrize(
    ("run", "where", "said"),
    [
        ("reward_fails", 1, "ValueError: the server is gone"),
        ("score_is_nan", 0, "returned nan"),
        ("disk_full", 0, "No space left on device"),
    ],
)
def test_what_fails_in_one_process_ends_both_with_its_message(shared: Path, run: str, where: int, said: str) -> None:
    parts = [part for (part,) in told(shared, run)]
    assert all(said in part["message"] for part in parts)
    assert parts[1 - where]["error"] == "UserError"
    assert parts[1 - where]["message"].startswith(f"process {where} failed: ")
    assert parts[0]["steps"] == parts[1]["steps"]


@pytest.mark.parametrize(
    ("run", "said"),
    [("odd_batch", "batch_size is 15.*a multiple of 2$"), ("split_groups", "rloo_samples = 4: give a multiple of 8$")],
)
def test_a_batch_that_processes_cannot_share_is_refused(shared: Path, run: str, said: str) -> None:
    for (part,) in told(shared, run):
        assert part["error"] == "ConfigError"
        with pytest.raises(ConfigError, match=said):
            raise ConfigError(part["message"])


def test_processes_that_do_not_find_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerator()  # this process is alone for good
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes, but accelerate sees 1"):
        processes.join()


def test_deepspeed_is_refused_with_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"fsdp2\.yaml"):
        processes.join()


# ---------------------------------------------------------------- from the command line


def test_the_command_line_trains_in_two_processes_and_prints_once(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in two_processes.PROMPTS))
    (tmp_path / "ppo.yaml").write_text(
        f"{{model: {tiny_model_folder}, reward: 'mine:score', prompts: prompts.jsonl, held_out: 0, output: out, "
        "total_episodes: 16, batch_size: 8, micro_batch_size: 4, num_mini_batches: 1, max_completion_tokens: 6, "
        "precision: fp32, tracking: {wandb: 'off'}}"
    )
    done = launch("-m", "rlhf", "ppo", "--config", "ppo.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert [line for line in lines if line.startswith("ppo 0/2")] == ["ppo 0/2"]
    assert sum(line.startswith("ppo 2/2") for line in lines) == 1
    assert len(read_records(tmp_path / "out" / "metrics.jsonl")) == 2
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("one_gpu", "NO", 1), ("eight_gpus", "MULTI_GPU", 8), ("fsdp2", "FSDP", 8), ("deepspeed", "DEEPSPEED", 8)],
)
def test_the_configurations_are_accelerates_own(name: str, kind: str, count: int) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert (config.num_processes, config.num_machines, config.use_cpu) == (count, 1, False)
    assert config.mixed_precision == "no"  # the weights stay fp32, and casting is the project's own
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)

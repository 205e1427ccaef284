"""Where memory is short: the same step again in halves, with the same result; what is said, and when it is given up.

A fault is planted for each moment at which memory can be short; the last test takes the memory away for real.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import ppo, rollout, update
from rlhf.config import LastLayers, PPOExtras
from rlhf.generation.plain import PlainEngine
from rlhf.out_of_memory import Halving, is_out_of_memory
from rlhf.types import UserError
from tests.rlhf import ppo_world as world

ROOT = Path(__file__).resolve().parents[2]
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
Fault = Callable[[int, dict[str, Any]], bool]
"""Whether memory is short in a forward pass of so many rows, given its keywords."""


def sampling(options: dict[str, Any]) -> bool:
    """Whether it is an engine that asks: nothing else keeps a cache, or puts rows into one line."""
    return bool(options.get("use_cache")) or "ragged" in options


def measuring(options: dict[str, Any]) -> bool:
    return not sampling(options) and not torch.is_grad_enabled()


def learning(options: dict[str, Any]) -> bool:
    return not sampling(options) and torch.is_grad_enabled()


def after(count: int, fault: Fault) -> Fault:
    """The same fault from its occasion number `count` on."""
    occasions = iter(range(10**9))
    return lambda rows, options: fault(rows, options) and next(occasions) >= count


FAULTS: dict[str, Callable[[], Fault]] = {
    "rows that decode together": lambda: lambda rows, options: sampling(options) and rows > 2,
    "policy or reference is measured": lambda: lambda rows, options: measuring(options) and rows > 2,
    "the reference is measured": lambda: after(2, lambda rows, options: measuring(options) and rows > 2),
    "the first minibatch": lambda: lambda rows, options: learning(options) and rows > 2,
    "the second micro-batch": lambda: after(1, lambda rows, options: learning(options) and rows > 2),
    "after an optimiser step": lambda: after(2, lambda rows, options: learning(options) and rows > 2),
    "the third rollout": lambda: after(4, lambda rows, options: learning(options) and rows > 2),
    "one row at a time fits": lambda: lambda rows, options: not sampling(options) and rows > 1,
}


def short_of_memory(policy: Any, fault: Fault) -> Any:
    """The policy, and every copy of it, raises what torch does on a CPU, wherever the fault says."""

    def refuse(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        line = options.get("ragged")
        if fault(line.rows if line else len(options["input_ids"]), options):
            raise RuntimeError(NO_MEMORY)

    policy.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    return policy


@pytest.fixture
def train(tiny_model_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """`train("name", fault, num_mini_batches=1)`: the folder of a short run in which memory is short there."""

    def run(name: str, fault: Fault | None = None, **changes: Any) -> Path:
        policy = world.policy(tiny_model_folder, tiny_tokenizer, changes.get("trainable", "full"))
        ppo.train(
            world.config(tmp_path / name, **({"micro_batch_size": 4, "total_episodes": 24} | changes)),
            policy=short_of_memory(policy, fault) if fault else policy,
            tokenizer=tiny_tokenizer,
            reward=world.length_reward,
            prompts=world.TEXTS,
        )
        return tmp_path / name

    return run


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = world.records(one), world.records(other)
    assert len(ours) == len(theirs) == 3
    for left, right in zip(ours, theirs, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=2e-6)
    assert [record["objective/scores"] for record in ours] == [record["objective/scores"] for record in theirs]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the same result


@pytest.mark.parametrize("num_mini_batches", [1, 2])
@pytest.mark.parametrize("where", FAULTS)
def test_a_run_in_halves_is_the_run_with_enough_memory(
    where: str, num_mini_batches: int, train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("whole", num_mini_batches=num_mini_batches)
    assert "out of memory" not in capsys.readouterr().err
    assert_same_run(train("halved", FAULTS[where](), num_mini_batches=num_mini_batches), whole)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    setting, size = ("rollout_batch_size", 8) if where.startswith("rows") else ("micro_batch_size", 4)
    halves = {"rows that decode together": [4, 2], "one row at a time fits": [2, 1]}.get(where, [2])
    assert said == [
        f"ppo: out of memory: {setting} is halved from {before} to {now} for the rest of this run, with the same "
        f"result; set {setting}: {now} to avoid this"
        for before, now in zip([size, *halves], halves, strict=False)
    ], "once for each halving in three rollouts: the run goes on in halves"


@pytest.mark.parametrize("where", FAULTS)
def test_with_one_minibatch_it_is_the_run_with_small_micro_batches_from_the_start(
    where: str, train: Callable[..., Path]
) -> None:
    """With more, other rows meet in a minibatch: that depends on the configured micro-batches, and never on memory."""
    small = train("small", num_mini_batches=1, micro_batch_size=2, rollout_batch_size=2)
    assert_same_run(train("halved", FAULTS[where](), num_mini_batches=1), small)


@pytest.mark.parametrize("where", ["policy or reference is measured", "the first minibatch", "after an optimiser step"])
@pytest.mark.parametrize(
    "changes",
    [{"trainable": LastLayers(1)}, {"micro_batch_tokens": 60}, {"extras": PPOExtras(rloo_samples=2)}],
    ids=str,
)
def test_trunks_token_budgets_and_groups_are_halved_as_well(
    where: str, changes: dict[str, Any], train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("whole", **changes)
    capsys.readouterr()
    assert_same_run(train("halved", FAULTS[where](), **changes), whole)
    setting = "micro_batch_tokens: 30" if "micro_batch_tokens" in changes else "micro_batch_size: 2"
    assert f"set {setting} to avoid this" in capsys.readouterr().err


def test_demonstrations_are_halved_with_the_minibatch(train: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "shown.jsonl"
    pairs = [(text, " and" * (i + 1)) for i, text in enumerate(world.TEXTS)]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    changes = {"extras": PPOExtras(ptx_coef=0.5, ptx_data=str(path)), "held_out": 0.0, "value_warmup_steps": 0}
    whole = train("whole", **changes)
    assert_same_run(train("halved", FAULTS["the first minibatch"](), **changes), whole)
    assert_same_run(train("later", after(2, FAULTS["the first minibatch"]()), **changes), whole)


def test_a_backward_pass_that_fails_is_undone() -> None:
    """Gradients of micro-batches that had gone through before it are in no step, and their tokens in no metric."""
    found = []
    for faulty in (False, True):
        model = world.actor_critic()
        batch = world.gathered(model, world.reference(model), micro_batch_size=4)
        learner = world.learner(model)
        if faulty:
            learner.forward = failing_backward(learner.forward, occasion=1)
        halving = Halving("micro_batch_size", 4)
        metrics = update.update(
            learner,
            batch,
            settings=world.settings(micro_batch_size=4, num_ppo_epochs=2),
            generator=world.seeded(),
            halving=halving,
        )
        assert halving.times == faulty
        found.append((metrics, world.snapshot(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=2e-6)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, rtol=0, atol=1e-5)


def failing_backward(forward: Any, *, occasion: int) -> Any:
    """A forward pass whose backward pass of more than two rows fails from the given occasion on."""
    occasions = iter(range(10**9))

    def fail(gradient: torch.Tensor) -> None:
        if len(gradient) > 2 and next(occasions) >= occasion:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def run(part: Any, **options: Any) -> Any:
        out = forward(part, **options)
        if out.logprobs.requires_grad:
            out.logprobs.register_hook(fail)
        return out

    return run


def test_in_bf16_the_first_minibatch_finds_the_policy_that_was_measured_in_the_same_halves() -> None:
    """A model whose logprobs depend on the number of rows, as those of bf16 do: ratios are 1 all the same."""
    model = world.actor_critic()
    learner = world.learner(model)
    plain = learner.forward

    def forward(part: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and len(part) > 2:
            raise RuntimeError(NO_MEMORY)
        out = plain(part, **options)
        return out._replace(logprobs=out.logprobs + 0.01 * len(part))

    learner.forward = forward
    halving, reference = Halving("micro_batch_size", 4), world.reference(model)
    batch = world.gathered(forward, reference, halving=halving)
    how: dict[str, Any] = {
        "model": forward,
        "ref_model": reference,
        "shaping": rollout.Shaping(kl_coef=0.1, missing_eos_penalty=1.0),
        "micro_batch_size": 4,
        "micro_batch_tokens": None,
        "num_mini_batches": 1,
        "halving": halving,
    }
    settings = world.settings(micro_batch_size=4)
    found = update.update(
        learner,
        batch,
        settings=settings,
        generator=world.seeded(),
        halving=halving,
        measure_again=lambda batch: rollout.measured_again(batch, **how),
    )
    assert halving.times == 1
    assert found["policy/approxkl_avg"] < 1e-12
    fresh = world.gathered(forward, reference, micro_batch_size=2)
    again = rollout.measured_again(batch, **how)
    for name, value in vars(fresh).items():
        same = torch.equal(value, getattr(again, name)) if isinstance(value, torch.Tensor) else True
        assert same or name in ("prompts", "completions"), name


def test_fewer_rows_decode_the_same_completions() -> None:
    model = world.actor_critic()
    engine = PlainEngine(
        model.policy, eos_token_ids=(world.EOS,), pad_token_id=world.PAD, dtype=torch.float32, batch_size=8
    )
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0}
    expected = engine.generate(world.PROMPTS, **options, generator=world.seeded(4))
    short_of_memory(model.policy, after(3, lambda rows, options: rows > 3))
    drawn = rollout.sample(engine, world.PROMPTS, **options, generator=world.seeded(4))
    assert engine.batch_size == 2
    assert [each.ids for each in drawn] == [each.ids for each in expected]
    assert [each.finished for each in drawn] == [each.finished for each in expected]
    for one, other in zip(drawn, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


# ---------------------------------------------------------------- an attempt that failed


def test_nothing_of_the_failed_attempt_is_held_in_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> bool:
        if held:
            return held[0]() is None
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        raise MemoryError

    halving = Halving("micro_batch_size", 5)
    assert halving.retried(attempt, rows=5)
    assert halving.now == 3
    assert [len(part) for part in halving.parts(torch.arange(5))] == [3, 2]


def test_what_else_goes_wrong_is_passed_on() -> None:
    halving = Halving("micro_batch_size", 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        halving.retried(lambda: torch.ones(2, 3) @ torch.ones(2, 3), rows=4)
    assert halving.times == 0


def test_what_torch_says_without_memory_is_understood() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(UserError("the reward ran out of memory"))
    assert not is_out_of_memory(KeyError("out of memory"))


# ---------------------------------------------------------------- where it is given up


def test_a_single_sequence_that_does_not_fit_ends_the_run_with_advice(train: Callable[..., Path]) -> None:
    with pytest.raises(
        UserError,
        match=r"^ppo: memory does not suffice for a single sequence at a time: train fewer weights \(trainable: lora, "
        r"or last_layers\), or lower max_prompt_tokens and max_completion_tokens$",
    ) as raised:
        train("broken", lambda rows, options: learning(options))
    assert is_out_of_memory(raised.value.__cause__)  # type: ignore[arg-type]


def test_one_of_several_processes_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for its part of the gradient for ever."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    halving = Halving("micro_batch_size", 4)

    def attempt() -> None:
        raise MemoryError

    with pytest.raises(UserError, match=r"^ppo: out of memory in one of 2 processes, .* set micro_batch_size below 4$"):
        halving.retried(attempt, rows=4)
    assert halving.times == 0


# ---------------------------------------------------------------- memory that is really not there


def test_with_memory_for_a_few_rows_only_a_run_ends_with_the_weights_of_small_micro_batches(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rlhf.little_memory", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert said[0] == (
        "ppo: out of memory: micro_batch_size is halved from 16 to 8 for the rest of this run, with the same result; "
        "set micro_batch_size: 8 to avoid this"
    )
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("small", "large"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5)
    assert max(float((one[name] - start[name]).abs().max()) for name in start) > 1e-3
    for left, right in zip(*(world.records(tmp_path / name) for name in ("small", "large")), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=2e-6)

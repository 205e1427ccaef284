"""Bugs that real PPO code has had, planted in this project's own code one at a time: each must turn its tests red.

`python -m tests.mutations` plants all of them (`--list` names them; numbers of pitfalls choose some). A bug is planted
by replacing one piece of source text in a copy of the project, never in the project itself. The same tests must be
green without any bug. Where a bug keeps PPO from learning, the exactly solvable world must show that too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rlhf", "reward_models", "labeling_ui", "experiments", "tests", "pyproject.toml")
PRELOADED = (
    "accelerate",
    "hypothesis",
    "peft",
    "scipy.stats",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""Imported once, in the process that the others are forked from. Nothing of this project is: a copy of it is tested."""
FAILED = 1
"""pytest's exit status for tests that ran and failed; 2 and more mean that they did not run."""
SOUND_CLOSED = 0.97
"""Share of the gap to the optimum that PPO closes in 100 updates, at least (it is 0.998 in A, 0.999 in A-shared)."""


@dataclass(frozen=True)
class Mutation:
    """One bug: `sound` stands exactly once in `file`, and `broken` takes its place."""

    pitfall: int
    what: str
    file: str
    sound: str
    broken: str
    tests: tuple[str, ...]
    missed_in: Literal["A", "A-shared"] | None = None
    """The exactly solvable world in which PPO must miss the optimum too, where the bug affects learning."""


def of(test_file: str, *names: str) -> tuple[str, ...]:
    """Test ids."""
    return tuple(f"tests/{test_file}::{name}" for name in names)


RESUME = of("rlhf/test_resume.py", "test_an_interrupted_run_ends_as_if_it_had_never_stopped")
MUTATIONS = (
    Mutation(
        1,
        "micro-batches are sorted by length and their logprobs not put back",
        "rlhf/rollout.py",
        "whole[rows, : part.shape[1]] =",
        "whole[rows.sort().values, : part.shape[1]] =",
        of("rlhf/test_update.py", "test_the_ratio_is_one_before_the_first_step_for_ragged_prompts[llama]"),
    ),
    Mutation(
        1,
        "the first minibatch is not checked",
        "rlhf/update.py",
        "if gap > SAME_POLICY_TOLERANCE:",
        "if gap > 1e9:",
        of("rlhf/test_update.py", "test_a_policy_that_moved_since_the_rollout_is_found"),
    ),
    Mutation(
        2,
        "dropout stays on",
        "rlhf/actor_critic.py",
        "        self.eval()\n",
        "",
        of("rlhf/test_actor_critic.py", "test_the_module_is_in_evaluation_mode_dropout_included"),
    ),
    Mutation(
        3,
        "padding is attended to",
        "rlhf/sequences.py",
        '"attention_mask": mask,',
        '"attention_mask": torch.ones_like(mask),',
        of("rlhf/test_actor_critic.py", "test_padding_of_any_content_side_and_amount_changes_nothing"),
    ),
    Mutation(
        5,
        "the mask is taken from ids != pad",
        "rlhf/sequences.py",
        "return length_mask(self.completion_lengths, self.completion_ids.shape[1])",
        "return self.completion_ids != 0",
        of("rlhf/test_rollout.py", "test_eos_is_in_the_mask_and_what_follows_is_not"),
        missed_in="A",
    ),
    Mutation(
        6,
        "logprobs forget the sampling temperature",
        "rlhf/lm_head.py",
        "        scaled /= temperature\n",
        "        pass\n",
        of("rlhf/test_rollout.py", "test_the_kl_uses_the_same_temperature_for_policy_and_reference"),
    ),
    Mutation(
        6,
        "the sampler forgets the temperature",
        "rlhf/generation/sampling.py",
        "scaled = logits.float() / temperature",
        "scaled = logits.float()",
        of("rlhf/test_generation.py", "test_the_samplers_logprobs_are_those_of_a_plain_forward"),
    ),
    Mutation(
        8,
        "EOS is left out of the action mask",
        "rlhf/sequences.py",
        "return length_mask(self.completion_lengths, self.completion_ids.shape[1])",
        "return length_mask(self.completion_lengths - 1, self.completion_ids.shape[1])",
        of("rlhf/test_rollout.py", "test_eos_is_in_the_mask_and_what_follows_is_not"),
        missed_in="A",
    ),
    Mutation(
        9,
        "the score goes to the last column, which for short completions is padding",
        "rlhf/ops.py",
        "is_last = mask & (tokens_left == 1)",
        "is_last = mask & (torch.arange(mask.shape[1], device=mask.device) == mask.shape[1] - 1)",
        of(
            "rlhf/test_rollout.py",
            "test_the_penalty_for_a_missing_eos_is_taken_at_the_completions_last_token",
        ),
        missed_in="A",
    ),
    Mutation(
        9,
        "the value after the end is not 0",
        "rlhf/ops.py",
        "next_value = torch.zeros_like(values[:, 0])",
        "next_value = values[:, -1]",
        of("rlhf/test_rollout.py", "test_the_listed_example_comes_out_of_a_rollout"),
        missed_in="A",
    ),
    Mutation(
        12,
        "advantages are whitened with the padding",
        "rlhf/rollout.py",
        "ops.whiten(advantages, mask, reduce=reduce), returns",
        "ops.whiten(advantages, torch.ones_like(mask), reduce=reduce), returns",
        of("rlhf/test_rollout.py", "test_the_listed_example_comes_out_of_a_rollout"),
    ),
    Mutation(
        12,
        "whitening takes away the mean of the rewards",
        "rlhf/rollout.py",
        "ops.whiten(rewards, mask, shift_mean=False, reduce=reduce)",
        "ops.whiten(rewards, mask, reduce=reduce)",
        of("rlhf/test_rollout.py", "test_whitened_rewards_keep_their_mean"),
    ),
    Mutation(
        14,
        "each micro-batch is averaged by itself",
        "rlhf/update.py",
        "accelerator.backward(loss * accelerator.num_processes / tokens)",
        "accelerator.backward(loss / batch.completion_mask[rows].sum() / len(group))",
        of("rlhf/test_update.py", "test_the_gradient_is_that_of_the_whole_batch_for_any_micro_batches"),
        missed_in="A-shared",
    ),
    Mutation(
        14,
        "each minibatch is divided by its own tokens",
        "rlhf/update.py",
        "        for number, group in enumerate(deal(micro_batches, settings.num_mini_batches, generator)):\n",
        "        for number, group in enumerate(deal(micro_batches, settings.num_mini_batches, generator)):\n"
        "            tokens = float(batch.completion_mask[torch.cat(group)].sum())\n",
        of("rlhf/test_update.py", "test_minibatches_together_have_the_gradient_of_the_whole_batch"),
    ),
    Mutation(
        14,
        "the critic's loss is averaged by micro-batch",
        "rlhf/update.py",
        "return ops.masked(value.loss, mask).sum()",
        "return ops.masked_mean(value.loss, mask)",
        of("rlhf/test_update.py", "test_the_critic_alone_has_the_same_gradient_for_any_micro_batches"),
    ),
    Mutation(
        16,
        "the value loss has lost its factor 0.5",
        "rlhf/losses.py",
        "TokenLoss(0.5 * torch.maximum(plain, clipped)",
        "TokenLoss(torch.maximum(plain, clipped)",
        of("rlhf/test_losses.py", "test_clipped_value_loss"),
    ),
    Mutation(
        16,
        "the value is clipped around the return, not around the old value",
        "rlhf/losses.py",
        "values.clamp(old_values - cliprange_value, old_values + cliprange_value)",
        "values.clamp(returns - cliprange_value, returns + cliprange_value)",
        of("rlhf/test_losses.py", "test_clipped_value_loss"),
    ),
    Mutation(
        16,
        "the KL is rewarded",
        "rlhf/ops.py",
        "masked(-kl_coef * kl, mask)",
        "masked(kl_coef * kl, mask)",
        of("rlhf/test_rollout.py", "test_the_kl_in_the_reward_is_k1_and_carries_no_gradient"),
        missed_in="A",
    ),
    Mutation(
        23,
        "a gradient that is not finite is stepped on",
        "rlhf/update.py",
        "    if finite:\n",
        "    if True:\n",
        of("rlhf/test_update.py", "test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted"),
    ),
    Mutation(
        27,
        "a reward model under lora is saved as an adapter without its head",
        "rlhf/models.py",
        'return _is_peft(model) and not hasattr(model, "score") and bool(',
        "return _is_peft(model) and bool(",
        of("reward_models/test_model.py", "test_folder_gives_the_same_scores_with_and_without_this_project[lora]"),
    ),
    Mutation(
        27,
        "the calibration is not kept with the reward model",
        "reward_models/model.py",
        "    config.score_mean, config.score_std = mean, std\n",
        "",
        of("reward_models/test_model.py", "test_reward_is_calibrated_once_and_is_a_reward_function"),
    ),
    Mutation(
        33,
        "the optimiser's moments are not restored",
        "rlhf/learner.py",
        '        self.optimizer.load_state_dict(sharding.optimizer_state_for(self.optimizer, states["optimizer"]))\n',
        "",
        RESUME,
    ),
    Mutation(
        33,
        "the schedule is not restored",
        "rlhf/learner.py",
        '        self.schedule.load_state_dict(states["schedule"])\n',
        "",
        RESUME,
    ),
    Mutation(
        33,
        "the random streams are not restored",
        "rlhf/learner.py",
        '        checkpoint.restore_random_states(states["random"])\n',
        "",
        RESUME,
    ),
    Mutation(
        33,
        "the value model is not restored",
        "rlhf/learner.py",
        '        _load(self._value_weights(), saved.weights("value"))\n',
        "",
        RESUME,
    ),
    Mutation(
        33,
        "the moving average is not restored",
        "rlhf/learner.py",
        '_load(self.ema, saved.weights("ema"))',
        "_load(self.ema, self._policy_weights())",
        RESUME,
    ),
    Mutation(
        33,
        "the KL coefficient starts anew",
        "rlhf/ppo.py",
        '_kl_controller(config, state["kl_coef"])',
        "_kl_controller(config, config.kl_coef)",
        RESUME,
    ),
    Mutation(
        34,
        "the old checkpoint goes before the new one was read back",
        "rlhf/checkpoint.py",
        "    verify(checkpoint)\n    remove_others(",
        "    remove_others(",
        of("rlhf/test_checkpoint.py", "test_a_checkpoint_that_reads_back_wrong_never_replaces_the_old_one"),
    ),
    Mutation(
        37,
        "every step draws the same random numbers",
        "rlhf/ppo.py",
        '_generator(self.config.seed, "rollout", step)',
        '_generator(self.config.seed, "rollout")',
        of("rlhf/test_ppo.py", "test_rollouts_differ_from_step_to_step_and_from_process_to_process"),
    ),
    Mutation(
        38,
        "the controller works the wrong way round",
        "rlhf/kl_control.py",
        "kl / self.target - 1",
        "1 - kl / self.target",
        of("rlhf/test_kl_control.py", "test_the_adaptive_weight_has_the_listed_values"),
    ),
    Mutation(
        38,
        "the controller is fed the KL per token",
        "rlhf/ppo.py",
        'kl_controller.update(metrics["objective/kl"],',
        'kl_controller.update(metrics["objective/kl_per_token"],',
        of("rlhf/test_ppo.py", "test_the_controller_is_fed_the_kl_per_sequence_of_the_run"),
    ),
)


def planted_text(mutation: Mutation, source: str) -> str:
    """The file with the bug in it. Raises ValueError when the place is not there exactly once."""
    if source.count(mutation.sound) != 1:
        raise ValueError(
            f"pitfall {mutation.pitfall}, {mutation.what}: {mutation.sound!r} stands {source.count(mutation.sound)} "
            f"times in {mutation.file}, but must stand there once"
        )
    return source.replace(mutation.sound, mutation.broken)


def check(mutation: Mutation) -> str | None:
    """Why this bug was not caught, or None when it was."""
    with _copy() as tree:
        file = Path(tree) / mutation.file
        file.write_text(planted_text(mutation, file.read_text(encoding="utf-8")), encoding="utf-8")
        status, output = _pytest(tree, mutation.tests)
        if status != FAILED:
            return f"{'the tests stay green' if status == 0 else f'pytest ended with {status}'}\n{output[-3000:]}"
        if mutation.missed_in and (closed := _closed(tree, mutation.missed_in)) > SOUND_CLOSED:
            return f"in world {mutation.missed_in} PPO still closes {closed:.1%} of the gap to the exact optimum"
    return None


def check_sound(tests: Sequence[str]) -> str | None:
    """Why these tests cannot be relied on: they are red without any bug. None when they are green."""
    with _copy() as tree:
        status, output = _pytest(tree, tests)
        if status:
            return f"without any bug pytest ended with {status}\n{output[-6000:]}"
        for world in ("A", "A-shared"):
            if (closed := _closed(tree, world)) < SOUND_CLOSED:
                return f"without any bug PPO closes only {closed:.1%} of the gap to the optimum of world {world}"
    return None


def _copy() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="mutation-")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        source, target = ROOT / name, Path(folder.name) / name
        shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    return folder


def _pytest(tree: str, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of pytest in the copy. Uses up this process: it has imported the copy afterwards."""
    import pytest

    os.chdir(tree)
    os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path[:] = [tree, *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    output = Path(tree) / "output.txt"
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    sys.stdout.flush()
    loaded = Path(sys.modules["rlhf"].__file__ or "") if "rlhf" in sys.modules else None
    if loaded is None or not loaded.is_relative_to(tree):
        return -1, f"pytest has tested {loaded}, not the copy\n{output.read_text()}"
    return status, output.read_text()


def _closed(tree: str, world: str) -> float:
    """Share of the gap to the exact optimum that PPO closes; minus infinity where it ends in an error."""
    options = ("--env", world, "--seed", "0", "--beta", "0.5", "--updates", "100", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.exact_optimum", *options],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": tree},
        capture_output=True,
        text=True,
        check=False,
    )
    return float("-inf") if done.returncode else float(json.loads(done.stdout)["closed"])


def main() -> int:
    """Plant the chosen bugs, print a line for each; the exit status is 1 when one was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("pitfalls", nargs="*", type=int, help="numbers of pitfalls; all when none is given")
    parser.add_argument("--list", action="store_true", help="only name the bugs and the tests that catch them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.pitfalls or m.pitfall in options.pitfalls]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.pitfall:3}  {mutation.what}\n     {mutation.file}  {' '.join(mutation.tests)}")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(list(PRELOADED))
    started, missed = time.monotonic(), 0
    with ProcessPoolExecutor(options.workers, mp_context=forks, max_tasks_per_child=1) as pool:
        sound = pool.submit(check_sound, sorted({test for mutation in chosen for test in mutation.tests}))
        for mutation, problem in zip(chosen, pool.map(check, chosen), strict=True):
            missed += problem is not None
            print(f"{'MISSED' if problem else 'caught'} {mutation.pitfall:3}  {mutation.what}", flush=True)
            if problem:
                print(problem)
        unsound = sound.result()
    print(unsound or f"{len(chosen) - missed} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    return int(bool(missed or unsound))


if __name__ == "__main__":
    sys.exit(main())

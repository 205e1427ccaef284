"""The 42 ways in which PPO for language models has gone wrong elsewhere, and the test that each one would turn red.

A bug is planted for many of them by `python -m tests.mutations`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

import pytest

from tests.mutations import MUTATIONS, ROOT, planted_text

MUST_BE_PLANTED = {1, 3, 5, 6, 8, 9, 12, 14, 16, 27, 33, 38}


@dataclass(frozen=True)
class Pitfall:
    """What goes wrong, the tests that see it (`file::test` under `tests/`), and what there is nothing to test about."""

    number: int
    what: str
    tests: tuple[str, ...]
    note: str = ""


PITFALLS = (
    Pitfall(
        1,
        "the ratio is not 1 in the first minibatch",
        (
            "rlhf/test_update.py::test_the_ratio_is_one_before_the_first_step_for_ragged_prompts",
            "rlhf/test_update.py::test_the_ratio_is_exactly_one_with_the_rollouts_own_micro_batches",
        ),
    ),
    Pitfall(
        2,
        "dropout is on for old, reference or value passes",
        (
            "rlhf/test_update.py::test_dropout_left_on_is_found_in_the_first_minibatch",
            "rlhf/test_actor_critic.py::test_the_module_is_in_evaluation_mode_dropout_included",
        ),
    ),
    Pitfall(
        3,
        "the side or amount of padding matters",
        (
            "rlhf/test_actor_critic.py::test_padding_of_any_content_side_and_amount_changes_nothing",
            "reward_models/test_model.py::test_score_does_not_depend_on_company_or_padding",
        ),
    ),
    Pitfall(
        4,
        "position ids do not follow the mask",
        (
            "rlhf/test_sequences.py::test_model_inputs_hold_all_tokens_but_the_last_at_their_own_positions",
            "rlhf/test_actor_critic.py::test_a_ragged_batch_gives_what_each_sequence_gives_alone",
        ),
    ),
    Pitfall(
        5,
        "pad equals EOS, and masks come from ids != pad",
        (
            "rlhf/test_text.py::test_the_pad_is_never_an_eos",
            "rlhf/test_rollout.py::test_eos_is_in_the_mask_and_what_follows_is_not",
            "rlhf/test_generation.py::test_a_pad_token_that_the_policy_writes_is_a_token_like_any_other",
        ),
    ),
    Pitfall(
        6,
        "sampling, policy and reference have different temperatures",
        (
            "rlhf/test_rollout.py::test_the_kl_uses_the_same_temperature_for_policy_and_reference",
            "rlhf/test_generation.py::test_the_samplers_logprobs_are_those_of_a_plain_forward",
            "rlhf/test_update.py::test_another_temperature_is_found_in_the_first_minibatch",
        ),
    ),
    Pitfall(
        7,
        "sampling is truncated (top-k, top-p, minimum length), the logprobs are not",
        (
            "rlhf/test_generation.py::test_a_generation_config_has_no_say",
            "rlhf/test_generation.py::test_completions_have_exactly_the_models_probabilities",
        ),
    ),
    Pitfall(
        8,
        "the action mask leaves out EOS or holds the first pad",
        ("rlhf/test_rollout.py::test_eos_is_in_the_mask_and_what_follows_is_not",),
    ),
    Pitfall(
        9,
        "the score is not on the last action token, or the value after it is not 0",
        (
            "rlhf/test_rollout.py::test_the_listed_example_comes_out_of_a_rollout",
            "rlhf/test_ops.py::test_the_score_lands_on_the_last_token_only",
        ),
    ),
    Pitfall(
        10,
        "one EOS id of several is honoured, or one inside the prompt",
        (
            "rlhf/test_generation.py::test_any_listed_eos_ends_a_completion_and_stays_in_it",
            "rlhf/test_generation.py::test_an_eos_in_the_prompt_ends_nothing",
            "rlhf/test_models.py::test_every_eos_of_the_generation_config_counts",
            "rlhf/test_rollout.py::test_the_penalty_for_a_missing_eos_is_taken_at_the_completions_last_token",
        ),
    ),
    Pitfall(
        11,
        "what was sampled is tokenised again",
        ("rlhf/test_rollout.py::test_the_ids_in_the_loss_are_the_sampled_ones",),
    ),
    Pitfall(
        12,
        "whitening reads the padding, moves the mean, or breaks on one token",
        (
            "rlhf/test_ops.py::test_whiten_reads_the_mask_only",
            "rlhf/test_ops.py::test_whiten_of_one_token_or_of_equal_tokens_is_zero",
            "rlhf/test_rollout.py::test_whitened_rewards_keep_their_mean",
        ),
    ),
    Pitfall(
        13,
        "advantages leak over the end of a sequence or through gaps",
        (
            "rlhf/test_ops.py::test_gae_ends_at_the_score_and_never_reads_the_padding",
            "rlhf/test_ops.py::test_gae_closes_gaps_in_the_mask",
        ),
        "sequences are not packed anywhere",
    ),
    Pitfall(
        14,
        "the loss of actor or critic depends on the micro-batches",
        (
            "rlhf/test_update.py::test_the_gradient_is_that_of_the_whole_batch_for_any_micro_batches",
            "rlhf/test_update.py::test_the_critic_alone_has_the_same_gradient_for_any_micro_batches",
            "reward_models/test_learner.py::test_gradient_does_not_depend_on_micro_batches",
        ),
    ),
    Pitfall(
        15,
        "metrics depend on the micro-batches or read the padding",
        (
            "rlhf/test_update.py::test_metrics_are_the_same_for_any_micro_batches",
            "rlhf/test_rollout.py::test_metrics_read_nothing_outside_the_mask",
        ),
    ),
    Pitfall(
        16,
        "a factor, the centre of the value clip, or the sign of the KL is wrong",
        (
            "rlhf/test_losses.py::test_clipped_value_loss",
            "rlhf/test_update.py::test_metrics_are_those_of_the_losses_by_hand",
            "rlhf/test_rollout.py::test_the_kl_in_the_reward_is_k1_and_carries_no_gradient",
        ),
    ),
    Pitfall(
        17,
        "logits are normalised in half precision",
        (
            "rlhf/test_ops.py::test_half_precision_logits_are_normalised_in_fp32",
            "rlhf/test_actor_critic.py::test_in_bf16_logprobs_and_entropy_are_normalised_in_fp32",
        ),
    ),
    Pitfall(
        18,
        "a value or reward head has the wrong type or start",
        (
            "rlhf/test_actor_critic.py::test_a_new_value_head_says_zero_in_fp32_even_under_autocast",
            "rlhf/test_models.py::test_a_new_score_is_drawn_with_its_seed_and_with_variance_one_over_d_plus_one",
        ),
    ),
    Pitfall(
        19,
        "views that carry a gradient are changed in place",
        ("rlhf/test_actor_critic.py::test_the_logits_stay_as_the_model_gave_them",),
    ),
    Pitfall(
        20,
        "a faster path loses gradients",
        ("rlhf/test_actor_critic.py::test_gradients_are_those_of_plain_forwards",),
    ),
    Pitfall(
        21,
        "graphs are kept from one micro-batch to the next",
        ("rlhf/test_update.py::test_nothing_that_is_kept_holds_on_to_a_graph",),
    ),
    Pitfall(
        22,
        "NaN outside the mask, or rows without a token, spoil the batch",
        (
            "rlhf/test_losses.py::test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient",
            "rlhf/test_ops.py::test_no_gradient_leaves_the_mask",
        ),
    ),
    Pitfall(
        23,
        "a gradient that is not finite ends in the weights",
        ("rlhf/test_update.py::test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted",),
    ),
    Pitfall(
        24,
        "there are two BOS, or templates drift apart",
        (
            "rlhf/test_text.py::test_a_conversation_has_exactly_one_bos_wherever_it_comes_from",
            "reward_models/test_model.py::test_policy_with_another_template_is_refused",
        ),
    ),
    Pitfall(
        25,
        "chat templates return something else than a list of ids",
        ("rlhf/test_text.py::test_a_conversation_has_exactly_one_bos_wherever_it_comes_from",),
    ),
    Pitfall(
        26,
        "the reward model reads another end of the text than it was trained on",
        (
            "reward_models/test_preferences.py::test_row_is_prompt_completion_eos_and_truncation_keeps_eos",
            "reward_models/test_model.py::test_the_score_is_read_at_eos",
            "reward_models/test_model.py::test_long_completion_is_cut_as_in_training_and_keeps_eos",
        ),
    ),
    Pitfall(
        27,
        "a reward model scores differently after saving, loading or merging",
        (
            "reward_models/test_model.py::test_folder_gives_the_same_scores_with_and_without_this_project",
            "reward_models/test_model.py::test_the_head_reloads_bit_for_bit",
        ),
    ),
    Pitfall(
        28,
        "the normaliser's mean and deviation do not survive loading",
        ("reward_models/test_model.py::test_reward_is_calibrated_once_and_is_a_reward_function",),
    ),
    Pitfall(
        29,
        "the reward model's loss is divided inside the loop over pairs",
        (
            "reward_models/test_losses.py::test_bradley_terry_is_the_mean_over_pairs",
            "reward_models/test_learner.py::test_loss_is_the_mean_over_rankings",
        ),
    ),
    Pitfall(
        30,
        "truncation loses the end, or pads are compared",
        (
            "reward_models/test_preferences.py::test_row_is_prompt_completion_eos_and_truncation_keeps_eos",
            "reward_models/test_model.py::test_score_does_not_depend_on_company_or_padding",
        ),
    ),
    Pitfall(
        31,
        "SFT labels are off by one",
        (
            "rlhf/test_sft.py::test_the_loss_is_on_the_completion_from_its_first_token_to_its_eos",
            "rlhf/test_sft.py::test_the_trainer_minimises_the_mean_over_the_completions_tokens",
        ),
    ),
    Pitfall(
        32,
        "adapters are merged wrongly where embeddings are tied or the vocabulary has changed",
        (
            "rlhf/test_models.py::test_a_saved_policy_loads_without_this_project",
            "rlhf/test_models.py::test_an_adapter_on_a_base_that_lies_nowhere_is_written_whole",
            "rlhf/test_models.py::test_a_policy_with_an_added_pad_loads_without_this_project",
        ),
    ),
    Pitfall(
        33,
        "a resumed run is another run",
        (
            "rlhf/test_resume.py::test_a_killed_run_ends_as_if_it_had_never_stopped",
            "rlhf/test_resume.py::test_a_killed_fine_tuning_ends_as_if_it_had_never_stopped",
            "reward_models/test_learner.py::test_resume_is_exact",
        ),
    ),
    Pitfall(
        34,
        "the old checkpoint goes before the new one is whole",
        (
            "rlhf/test_checkpoint.py::test_the_old_one_goes_only_after_the_new_one_was_read_back",
            "rlhf/test_checkpoint.py::test_a_write_that_fails_at_any_moment_leaves_the_old_one",
        ),
    ),
    Pitfall(
        35,
        "the last partial batch crashes or is skipped",
        (
            "rlhf/test_update.py::test_the_last_partial_micro_batch_is_trained_too",
            "reward_models/test_learner.py::test_every_ranking_once_an_epoch_and_the_last_partial_batch_is_trained",
        ),
    ),
    Pitfall(
        36,
        "a baseline over a group of one makes every advantage 0",
        ("rlhf/test_ops.py::test_rloo_refuses_single_samples",),
    ),
    Pitfall(
        37,
        "steps or workers share their random numbers",
        ("rlhf/test_ppo.py::test_rollouts_differ_from_step_to_step_and_from_process_to_process",),
    ),
    Pitfall(
        38,
        "the KL controller is fed another KL, or works the wrong way round",
        (
            "rlhf/test_kl_control.py::test_the_adaptive_weight_has_the_listed_values",
            "rlhf/test_ppo.py::test_the_controller_is_fed_the_kl_per_sequence_of_the_run",
        ),
    ),
    Pitfall(
        39,
        "a score of 0 counts as missing",
        (
            "rlhf/test_rollout.py::test_any_numbers_are_scores_zero_among_them",
            "rlhf/test_ops.py::test_a_score_of_zero_or_an_undefined_score_of_an_empty_row_is_harmless",
        ),
    ),
    Pitfall(
        40,
        "a cached data set outlives its template",
        (
            "rlhf/test_sft.py::test_a_template_changes_the_rows_at_once",
            "rlhf/test_text.py::test_the_hash_changes_with_vocabulary_bos_rule_and_template",
        ),
    ),
    Pitfall(
        41,
        "ranks disagree on the number of steps",
        (
            "rlhf/test_update.py::test_the_number_of_optimiser_steps_does_not_depend_on_the_rollout",
            "rlhf/test_distributed.py::test_processes_take_the_same_number_of_steps",
        ),
    ),
    Pitfall(
        42,
        "generation changes the model's config, type or mode",
        ("rlhf/test_generation.py::test_sampling_leaves_the_model_as_it_was",),
    ),
)


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of a file under `tests/`."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def exists(test: str) -> bool:
    """Whether `file::test` or `file::test[case]` names a test function."""
    file, _, name = test.partition("::")
    return name.partition("[")[0] in names_in(file)


def test_all_42_are_here() -> None:
    assert [pitfall.number for pitfall in PITFALLS] == list(range(1, 43))


@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda pitfall: f"{pitfall.number}: {pitfall.what}")
def test_every_pitfall_has_a_test(pitfall: Pitfall) -> None:
    assert pitfall.tests
    assert [test for test in pitfall.tests if not exists(test)] == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.pitfall}: {mutation.what}")
def test_every_planted_bug_has_its_place_in_the_code_and_its_tests(mutation) -> None:
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert planted_text(mutation, source) != source
    assert [test for test in mutation.tests if not exists(test.removeprefix("tests/"))] == []


def test_the_pitfalls_that_matter_most_are_planted() -> None:
    assert {mutation.pitfall for mutation in MUTATIONS} >= MUST_BE_PLANTED

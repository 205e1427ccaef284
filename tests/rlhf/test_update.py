"""One PPO update: what it computes for any split of the batch, when it stops, skips or refuses, and what it leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import ops, update
from rlhf.actor_critic import TokenOutputs
from rlhf.losses import policy_loss, value_loss
from rlhf.micro_batches import partition
from rlhf.rollout import Rollout, Shaping
from rlhf.sequences import Sequences
from rlhf.update import TokenSums, deal, demonstration_loss, minibatch_loss, optimizer_step
from tests.rlhf import ppo_world as world

SPLITS = [1, 2, 3, 5, 8]


def run(learner: Any, batch: Rollout, *, seed: int = 0, **changes: Any) -> dict[str, float]:
    train_policy = changes.pop("train_policy", True)
    ptx_batches = changes.pop("ptx_batches", None)
    return update.update(
        learner,
        batch,
        settings=world.settings(**changes),
        generator=world.seeded(seed),
        train_policy=train_policy,
        ptx_batches=ptx_batches,
    )


def held_still(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Replace the optimiser step by one that only notes the gradients."""
    seen: list[dict[str, Tensor]] = []

    def note(learner: Any, _: float) -> tuple[float, float]:
        named = dict(learner.model.named_parameters()).items()
        seen.append({name: w.grad.clone() for name, w in named if w.grad is not None})
        learner.optimizer.zero_grad(set_to_none=True)
        return 0.0, 0.0

    monkeypatch.setattr(update, "optimizer_step", note)
    return seen


def expected_loss(model: Any, batch: Rollout, *, vf_coef: float = 0.1) -> Tensor:
    """The objective of a whole batch, written down once more: one sequence at a time, no padding, no micro-batch."""
    policy = value = torch.zeros(())
    for b, (prompt, completion) in enumerate(zip(world.PROMPTS, world.COMPLETIONS, strict=True)):
        n = len(completion)
        out = model(Sequences.from_lists([prompt], [completion], pad=world.PAD))
        for t in range(n):
            a, old = batch.advantages[b, t], batch.logprobs[b, t]
            ratio = (out.logprobs[0, t] - old).exp()
            policy = policy + torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
            v, v_old, r = out.values[0, t], batch.values[b, t], batch.returns[b, t]
            near = v_old + (v - v_old).clamp(-0.2, 0.2)
            value = value + 0.5 * torch.maximum((v - r) ** 2, (near - r) ** 2)
    return (policy + vf_coef * value) / sum(map(len, world.COMPLETIONS))


@pytest.mark.parametrize("train_policy", [True, False], ids=["both", "warm-up"])
def test_a_separate_critic_has_passes_of_its_own(train_policy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's is over before the critic's begins; gradients and metrics are those of the whole loss."""
    model = world.actor_critic(critic=True)
    batch = world.gathered(model, world.reference(model))
    learner, events = world.learner(model), []
    model.policy.register_forward_hook(lambda *_: events.append("policy"))
    model.policy.model.embed_tokens.weight.register_hook(lambda _: events.append("policy's gradient"))
    model.value.backbone.register_forward_hook(lambda *_: events.append("value"))
    model.policy.model.register_forward_hook(lambda *_: events.append("policy"))
    seen = held_still(monkeypatch)
    found = run(learner, batch, train_policy=train_policy, micro_batch_size=8)
    assert events == (["policy", "policy's gradient", "value"] if train_policy else ["policy", "value"])
    monkeypatch.setattr(update, "one_by_one", lambda _: ())
    together = run(learner, batch, train_policy=train_policy, micro_batch_size=8)
    assert found == pytest.approx(together, rel=1e-6, abs=1e-9)
    expected_loss(model, batch).backward()
    assert set(seen[0]) == {name for name, _ in model.named_parameters() if train_policy or name.startswith("value.")}
    for name, gradient in seen[0].items():
        wanted = dict(model.named_parameters())[name].grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_demonstrations_beside_a_separate_critic_leave_the_critic_alone() -> None:
    model = world.actor_critic(critic=True)
    batch = world.gathered(model, world.reference(model))
    shown = Sequences.from_lists(world.PROMPTS[:2], world.COMPLETIONS[:2], pad=world.PAD)
    read: list[int] = []
    model.value.backbone.register_forward_hook(lambda *_: read.append(1))
    run(world.learner(model), batch, micro_batch_size=8, ptx_batches=iter([shown]), ptx_coef=1.0)
    assert len(read) == 1, "once for the rollout's own micro-batch"


# ---------------------------------------------------------------- the first minibatch


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
def test_the_ratio_is_one_before_the_first_step_for_ragged_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held_still(monkeypatch)
    model = world.actor_critic(name)
    for micro_batch_size in SPLITS:
        batch = world.gathered(model, world.reference(model), micro_batch_size=micro_batch_size)
        found = run(world.learner(model), batch, micro_batch_size=micro_batch_size, num_mini_batches=1)
        assert found["policy/approxkl_avg"] < 1e-12
        assert found["policy/clipfrac_avg"] == 0
        assert found["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert abs(found["loss/policy_avg"]) < 1e-6, "whitened advantages have mean 0"


def test_the_ratio_is_exactly_one_with_the_rollouts_own_micro_batches() -> None:
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model), micro_batch_size=3)
    for rows in partition(batch, 3):
        part = batch.select(rows)
        now = ops.masked(model(part).logprobs, part.completion_mask)
        assert torch.equal(now, part.logprobs), "not a single bit may differ"


def test_dropout_left_on_is_found_in_the_first_minibatch() -> None:
    model = world.actor_critic("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    batch = world.gathered(model, world.reference(model))
    model.policy.train()
    with pytest.raises(RuntimeError, match=r"before the first optimiser step .* such as dropout"):
        run(world.learner(model), batch)
    model.policy.eval()
    run(world.learner(model), batch)


def test_another_temperature_is_found_in_the_first_minibatch() -> None:
    model = world.actor_critic(temperature=0.7)
    batch = world.gathered(model, world.reference(model))
    model.temperature = 1.0
    with pytest.raises(RuntimeError, match="differ from the rollout's by up to"):
        run(world.learner(model), batch)


def test_a_policy_that_moved_since_the_rollout_is_found() -> None:
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    with torch.no_grad():
        model.policy.get_output_embeddings().weight.add_(1e-3 * torch.randn(384, 32, generator=world.seeded()))
    with pytest.raises(RuntimeError, match="before the first optimiser step"):
        run(world.learner(model), batch)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("micro_batch_size", SPLITS)
def test_the_gradient_is_that_of_the_whole_batch_for_any_micro_batches(
    micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = held_still(monkeypatch)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    with torch.no_grad():  # away from ratio 1, where clipping and the value clip matter
        noise = 0.05 * torch.randn(batch.logprobs.shape, generator=world.seeded(3))
        batch.logprobs.add_(ops.masked(noise, batch.completion_mask))
        batch.values.add_(ops.masked(8 * noise, batch.completion_mask))
    monkeypatch.setattr(update, "SAME_POLICY_TOLERANCE", 1.0)
    run(world.learner(model), batch, micro_batch_size=micro_batch_size)
    expected_loss(model, batch).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(seen[0][name], weight.grad, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()


@pytest.mark.parametrize("num_mini_batches", [2, 3, 4])
def test_minibatches_together_have_the_gradient_of_the_whole_batch(
    num_mini_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their mean is it: each divided by its own tokens, one of short completions would weigh as much as a long one."""
    seen = held_still(monkeypatch)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model), micro_batch_size=2)
    run(world.learner(model), batch, micro_batch_size=2, num_mini_batches=num_mini_batches, num_ppo_epochs=1)
    assert len(seen) == num_mini_batches
    expected_loss(model, batch).backward()
    for name, weight in model.named_parameters():
        mean = torch.stack([gradients[name] for gradients in seen]).mean(0)
        torch.testing.assert_close(mean, weight.grad, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()


def test_the_critic_alone_has_the_same_gradient_for_any_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = held_still(monkeypatch)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    for micro_batch_size in SPLITS:
        run(world.learner(model), batch, micro_batch_size=micro_batch_size, train_policy=False)
    assert all(set(gradients) == {"value.linear.weight", "value.linear.bias"} for gradients in seen)
    for gradients in seen[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, seen[0][name], rtol=1e-5, atol=1e-7)


def test_every_token_weighs_the_same_whatever_the_length_of_its_sequence() -> None:
    """The policy's part of the gradient on a table of logits, where the answer is -A / N on each sampled token."""
    logits = torch.zeros(8, 5, requires_grad=True)
    rows = Sequences.from_lists(world.PROMPTS, world.COMPLETIONS, pad=world.PAD)
    mask = rows.completion_mask
    zeros = torch.zeros(8, 5)
    rollout = Rollout(
        **vars(rows),
        finished=torch.ones(8, dtype=torch.bool),
        scores=torch.zeros(8),
        logprobs=zeros,
        ref_logprobs=zeros,
        sampler_logprobs=zeros,
        entropy=zeros,
        values=zeros,
        rewards=zeros,
        advantages=ops.masked(torch.ones(8, 5), mask),
        returns=zeros,
    )
    sums = TokenSums()
    loss = minibatch_loss(
        lambda batch, **_: TokenOutputs(logits, zeros, zeros),
        rollout,
        settings=world.settings(),
        train_policy=True,
        sums=[sums],
        must_be_same_policy=True,
    )
    (loss / int(mask.sum())).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.where(mask, -1 / 21, 0.0))
    assert int(mask.sum()) == 21
    assert {int(tokens) for _, tokens in sums.totals.values()} == {21}


def test_the_last_partial_micro_batch_is_trained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwarded = world.actor_critic(), []
    batch = world.gathered(model, world.reference(model), micro_batch_size=3)
    learner = world.learner(model)
    plain = learner.forward
    learner.forward = lambda part, **options: forwarded.append(len(part)) or plain(part, **options)
    run(learner, batch, micro_batch_size=3, num_mini_batches=2)
    assert sorted(forwarded) == [2, 3, 3]


@pytest.mark.parametrize(("count", "mini_batches"), [(8, 3), (3, 8), (7, 7), (1, 4), (5, 1)])
def test_dealing_uses_every_micro_batch_once_in_an_order_of_the_generator(count: int, mini_batches: int) -> None:
    parts = [torch.tensor([i]) for i in range(count)]
    groups = deal(parts, mini_batches, world.seeded())
    assert sorted(int(part) for group in groups for part in group) == list(range(count))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert len(groups) == min(count, mini_batches)
    again = deal(parts, mini_batches, world.seeded())
    assert [[int(p) for p in g] for g in groups] == [[int(p) for p in g] for g in again]


def test_the_number_of_optimiser_steps_does_not_depend_on_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that disagree on it wait for each other for ever: neither lengths nor scores may have a say."""
    short = [[world.EOS]] * 8
    for completions, scores in ((world.COMPLETIONS, world.SCORES), (short, [0.0] * 8)):
        seen = held_still(monkeypatch)
        model = world.actor_critic()
        batch = world.gathered(
            model,
            world.reference(model),
            micro_batch_size=2,
            engine=world.Scripted(completions),
            reward=lambda p, c, scores=scores: scores,
        )
        run(world.learner(model), batch, num_ppo_epochs=3, num_mini_batches=2, micro_batch_size=2)
        assert len(seen) == 6


# ---------------------------------------------------------------- metrics


def test_metrics_are_the_same_for_any_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    held_still(monkeypatch)
    monkeypatch.setattr(update, "SAME_POLICY_TOLERANCE", 10.0)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    noise = 0.3 * torch.randn(batch.logprobs.shape, generator=world.seeded(3))
    batch.logprobs.add_(ops.masked(noise, batch.completion_mask))
    found = [run(world.learner(model), batch, micro_batch_size=size) for size in SPLITS]
    mask = batch.completion_mask
    log_ratio = -noise[mask].double()
    by_hand = {
        "policy/approxkl_avg": float(0.5 * (log_ratio**2).mean()),
        "val/ratio": float(log_ratio.exp().mean()),
        "val/ratio_var": float(log_ratio.exp().var(correction=0)),
    }
    assert found[0]["policy/clipfrac_avg"] > 0
    for metrics in found:
        assert {name: metrics[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-4)
        assert metrics == pytest.approx(found[0], rel=1e-5, abs=1e-6)


def test_metrics_are_those_of_the_losses_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    held_still(monkeypatch)
    monkeypatch.setattr(update, "SAME_POLICY_TOLERANCE", 10.0)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    with torch.no_grad():
        out = model(batch)
    mask = batch.completion_mask
    batch.logprobs.add_(ops.masked(0.3 * torch.randn(8, 5, generator=world.seeded(4)), mask))
    batch.values.add_(0.5)
    found = run(world.learner(model), batch)
    policy = policy_loss(logprobs=out.logprobs, old_logprobs=batch.logprobs, advantages=batch.advantages, cliprange=0.2)
    value = value_loss(values=out.values, old_values=batch.values, returns=batch.returns, cliprange_value=0.2)
    expected = {
        "loss/policy_avg": policy.loss[mask].mean(),
        "loss/value_avg": value.loss[mask].mean(),
        "policy/clipfrac_avg": policy.clipped[mask].float().mean(),
        "val/clipfrac_avg": value.clipped[mask].float().mean(),
    }
    for name, number in expected.items():
        assert found[name] == pytest.approx(float(number), rel=1e-4), name


def test_nothing_that_is_kept_holds_on_to_a_graph() -> None:
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    assert not any(value.requires_grad for value in vars(batch).values() if isinstance(value, Tensor))
    sums = TokenSums()
    loss = minibatch_loss(
        model, batch, settings=world.settings(), train_policy=True, sums=[sums], must_be_same_policy=True
    )
    assert loss.requires_grad
    assert not any(total.requires_grad for total in sums.totals.values())


# ---------------------------------------------------------------- the optimiser step


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in ("policy", "value"):
        model = world.actor_critic()
        batch, learner = world.gathered(model, world.reference(model)), world.learner(model, ema_decay=0.9)
        part = getattr(model, broken)
        weight = next(part.parameters())
        handle = weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        before, average = world.snapshot(model), {name: w.clone() for name, w in learner.ema.items()}
        found = run(learner, batch, num_mini_batches=2, micro_batch_size=2)
        assert world.same(before, model), f"a broken gradient of the {broken} ended in the weights"
        assert all(torch.equal(average[name], w) for name, w in learner.ema.items())
        assert not learner.optimizer.state_dict()["state"], "nor may it end in Adam's moments"
        assert found["val/skipped_steps"] == 2
        assert all(map(math.isfinite, found.values()))
        assert all(w.grad is None for w in model.parameters())
        handle.remove()
        assert run(learner, batch)["val/skipped_steps"] == 0
        assert not world.same(before, model)


def test_the_gradient_is_clipped_for_policy_and_value_apart() -> None:
    model = world.actor_critic()
    learner = world.learner(model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    policy, value = (sum(w.numel() for w in part.parameters()) ** 0.5 for part in (model.policy, model.value))
    taken: list[dict[str, Tensor]] = []
    plain = learner.optimizer.step
    learner.optimizer.step = lambda: (
        taken.append({name: w.grad.clone() for name, w in model.named_parameters()}) or plain()
    )
    norms = optimizer_step(learner, 0.5)
    assert norms == pytest.approx((policy, value), rel=1e-5)
    for part in ("policy", "value"):
        squared = sum(float((g.double() ** 2).sum()) for name, g in taken[0].items() if name.startswith(part))
        assert squared**0.5 == pytest.approx(0.5, rel=1e-4)


def test_the_average_follows_the_policy() -> None:
    model = world.actor_critic()
    learner = world.learner(model, ema_decay=0.75)
    batch = world.gathered(model, world.reference(model))
    before = world.snapshot(model.policy)
    run(learner, batch)
    for name, weight in model.policy.named_parameters():
        torch.testing.assert_close(learner.ema[name], 0.75 * before[name] + 0.25 * weight.detach(), rtol=0, atol=1e-6)
    learner.use_average()
    assert all(torch.equal(learner.ema[name], w) for name, w in model.policy.named_parameters())


# ---------------------------------------------------------------- refinements


def test_the_warm_up_leaves_the_policy_alone_to_the_bit() -> None:
    model = world.actor_critic()
    batch, learner = world.gathered(model, world.reference(model)), world.learner(model)
    before, head = world.snapshot(model.policy), world.snapshot(model.value)
    for seed in range(3):
        found = run(learner, batch, seed=seed, num_ppo_epochs=2, num_mini_batches=2, train_policy=False)
    assert world.same(before, model.policy)
    assert not world.same(head, model.value)
    assert found["grad_norm/policy"] == 0 < found["grad_norm/value"]


def test_the_warm_up_fits_the_returns() -> None:
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    learner = world.learner(model, value_learning_rate=0.05)
    losses = [
        run(learner, batch, seed=seed, cliprange_value=None, train_policy=False)["loss/value_avg"] for seed in range(40)
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_target_kl_leaves_the_remaining_epochs() -> None:
    steps = {}
    for target_kl in (None, 1e9, 1e-9):
        model = world.actor_critic()
        batch, learner = world.gathered(model, world.reference(model), micro_batch_size=2), world.learner(model)
        run(learner, batch, num_ppo_epochs=5, num_mini_batches=2, micro_batch_size=2, target_kl=target_kl)
        steps[target_kl] = int(learner.optimizer.state_dict()["state"][0]["step"])
    assert steps == {None: 10, 1e9: 10, 1e-9: 2}


def test_dual_clip_bounds_what_a_bad_token_with_a_large_ratio_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = held_still(monkeypatch)
    monkeypatch.setattr(update, "SAME_POLICY_TOLERANCE", 10.0)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    batch.logprobs.sub_(ops.masked(torch.full((8, 5), 2.0), batch.completion_mask))  # all ratios are e^2
    batch.advantages.copy_(ops.masked(torch.full((8, 5), -1.0), batch.completion_mask))
    for dual_clip, loss in ((None, math.exp(2)), (3.0, 3.0)):
        found = run(world.learner(model), batch, dual_clip=dual_clip, vf_coef=0.0)
        assert found["loss/policy_avg"] == pytest.approx(loss, rel=1e-5)
    head = "policy.lm_head.weight" if "policy.lm_head.weight" in seen[0] else "policy.model.embed_tokens.weight"
    assert seen[0][head].abs().max() > 0
    assert seen[1][head].abs().max() == 0, "where the bound decides there is no gradient"


def test_demonstrations_are_mixed_in_with_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = held_still(monkeypatch)
    model = world.actor_critic()
    batch = world.gathered(model, world.reference(model))
    shown = Sequences.from_lists([[5, 6], [7]], [[8, 9, world.EOS], [world.EOS]], pad=world.PAD)
    run(world.learner(model), batch, ptx_batches=iter([shown]), ptx_coef=2.5)
    run(world.learner(model), batch)
    alone = [
        model.policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for ids in ([5, 6, 8, 9, world.EOS], [7, world.EOS])
    ]
    wanted = alone[0][1, 8] + alone[0][2, 9] + alone[0][3, world.EOS] + alone[1][0, world.EOS]
    (-2.5 * wanted / 4).backward()
    for name, weight in model.policy.named_parameters():
        difference = seen[0][f"policy.{name}"] - seen[1][f"policy.{name}"]
        torch.testing.assert_close(difference, weight.grad, rtol=1e-3, atol=2e-6)
    assert demonstration_loss(model, shown).item() == pytest.approx(-wanted.item() / 4, rel=1e-5)


def test_rloo_learns_without_a_value_model() -> None:
    model = world.actor_critic(value=False)
    batch = world.gathered(model, world.reference(model), shaping=Shaping(kl_coef=0.1, rloo_samples=2))
    learner = world.learner(model)
    assert len(learner.optimizer.param_groups) == 1
    before = world.snapshot(model)
    found = run(learner, batch)
    assert not world.same(before, model)
    assert found["grad_norm/value"] == 0


def test_an_update_makes_good_tokens_likelier_and_bad_ones_less_likely() -> None:
    model = world.actor_critic()
    batch, learner = world.gathered(model, world.reference(model)), world.learner(model, learning_rate=1e-4)
    run(learner, batch, vf_coef=0.0)
    with torch.no_grad():
        moved = model(batch).logprobs - batch.logprobs
    mask = batch.completion_mask
    assert float((moved * batch.advantages)[mask].mean()) > 0


def test_the_reference_never_moves() -> None:
    model = world.actor_critic()
    ref = world.reference(model)
    before = world.snapshot(ref)
    learner = world.learner(model)
    for seed in range(2):
        run(learner, world.gathered(model, ref), seed=seed, num_ppo_epochs=2)
    assert world.same(before, ref)

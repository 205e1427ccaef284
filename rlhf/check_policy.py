"""Invariants of PPO on a policy: ratio, padding, sampler, gradients, what is frozen, and what is saved.

Each function takes the subject and returns a finding; its docstring is the invariant.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import check_causes, models, ops, rollout, text
from rlhf.check_report import Finding, failed, noted, passed, skipped, within
from rlhf.check_subject import MAX_TOKENS, SAMPLED_TOKENS, Subject, branch_gap, largest, measured, run_update
from rlhf.config import LastLayers, Lora
from rlhf.generation.choice import engine_for
from rlhf.sequences import Sequences
from rlhf.update import SAME_POLICY_TOLERANCE, TokenSums, UpdateSettings, minibatch_loss

SAMPLER_BOUND = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Of the mean difference of generation-time and training-time logprobs, in nats a token: KL(sampler || policy)."""
ROUNDING = 1e-4
"""Of fp32 logprobs, values and scores of one sequence in different batches."""


def dropout(subject: Subject) -> Finding:
    """Two forwards of the same tokens are the same bit for bit: dropout is off in policy, value and reference."""
    once, again = subject.rollout, measured(subject.in_fp32, subject.sequences)
    gap = max(largest(once.logprobs - again.logprobs), largest(once.values - again.values))
    training = sum(module.training for module in subject.model.modules())
    advice = "call model.eval() before PPO, and train() nowhere: rollout, old and new logprobs must be of one function"
    if not gap <= 0:
        cause = f"dropout is on, with {training} modules in training mode" if training else "the model is random"
        return failed(f"{cause}: the same tokens get different logprobs", advice, gap, 0.0)
    if training:
        return noted(f"{training} modules are in training mode, but none of them has dropout", advice, gap)
    config = (subject.source or subject.policy).config.to_dict()
    rates = {name: rate for name, rate in config.items() if "drop" in name and isinstance(rate, float) and rate > 0}
    if rates:
        shown = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        return noted(
            f"the config sets dropout ({shown})", "off here: all of PPO computes in evaluation mode, updates included"
        )
    return passed(gap, 0.0)


def ratio(subject: Subject) -> Finding:
    """Before the update every probability ratio is 1: ragged prompts, micro-batches of 1, 3 and all rows."""
    gap = 0.0
    for size in (1, 3, len(subject.sequences)):
        groups = rollout.partition(subject.sequences, size)
        old = rollout.measure(subject.model, subject.sequences, groups).logprobs
        for rows in groups:
            batch = subject.sequences.select(rows)
            new = subject.model(batch).logprobs.detach()
            gap = max(gap, largest(ops.masked(new - old[rows, : new.shape[1]], batch.completion_mask)))
    return within(
        gap,
        SAME_POLICY_TOLERANCE,
        cause="the training forward finds other logprobs than the rollout's, before any weight has changed",
        advice="see `dropout`; else something in the model is not a function of its tokens alone (noise, state)",
    )


def padding(subject: Subject) -> Finding:
    """Logprobs and values of a sequence do not depend on padding (side, amount, token) or on its neighbours."""
    batch, alone = subject.sequences, _unpadded_logprobs(subject)
    wide = replace(
        batch,
        prompt_ids=F.pad(batch.prompt_ids, (7, 0), value=subject.tokenizer.eos_token_id),
        completion_ids=F.pad(batch.completion_ids, (0, 5), value=subject.tokenizer.eos_token_id),
    )
    with torch.no_grad():
        together = subject.in_fp32(wide)  # not measured: that would cut the padding off again
    single = measured(subject.in_fp32, batch, 1)
    gap = max(largest(together.logprobs[i, : len(row)] - row) for i, row in enumerate(alone))
    values = ops.masked(together.values[:, : batch.completion_ids.shape[1]], batch.completion_mask)
    value_gap = largest(values - single.values)
    if max(gap, value_gap) <= ROUNDING:
        return passed(max(gap, value_gap), ROUNDING)
    return failed(
        f"logprobs differ by up to {gap:.1e} and values by up to {value_gap:.1e} between a sequence alone and the same "
        f"sequence padded in a batch{check_causes.of_padding(subject, wide, together.logprobs)}",
        "the model must use attention_mask and position_ids: update transformers, or set attn_implementation",
        max(gap, value_gap),
        ROUNDING,
    )


def sampler(subject: Subject) -> Finding:
    """Logprobs while sampling and in training agree: the same temperature, nothing truncated, in PPO's precision."""
    drawn = subject.sampled
    batch = Sequences.from_lists(subject.prompt_ids, [s.ids for s in drawn], pad=subject.tokenizer.pad_token_id)
    logprobs = measured(subject.model, batch.to(subject.device)).logprobs
    rows = [row[: len(s.ids)] for row, s in zip(logprobs, drawn, strict=True)]
    difference = check_causes.difference(rows, drawn)
    # in fp32 no single token may differ; in bf16 tokens do, by about 0.05 nats, but not on average
    gap = float(difference.abs().mean() if subject.model.dtype == torch.float32 else difference.mean().abs())
    bound = SAMPLER_BOUND[subject.model.dtype]
    if gap <= bound:
        return passed(gap, bound)
    return failed(
        f"the sampler's logprobs differ from those of training at temperature {subject.model.temperature:g}"
        + check_causes.of_sampler(subject, float(difference.abs().mean())),
        "use one temperature in rollout and loss, and no top-k, top-p or penalty; an engine of your own must "
        "have the policy's present weights",
        gap,
        bound,
    )


def stops(subject: Subject) -> Finding:
    """A completion ends with the first EOS sampled, which it keeps, and with no other id; one in a prompt ends none."""
    if cause := _wrong_end(subject):
        return failed(cause, "the engine must stop at each of these ids and at no other, and keep the one that it drew")
    free = [drawn.ids for drawn in _sampled_until(subject, ())]
    end = free[0][min(2, len(free[0]) - 1)]  # whatever was drawn third plays EOS: random models hardly draw their own
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    stopped = _sampled_until(subject, (end,))
    wrong = [
        i
        for i, (mine, ids) in enumerate(zip(stopped, expected, strict=True))
        if mine.ids != ids or mine.finished != (ids[-1] == end)
    ]
    if wrong:
        i = wrong[0]
        return failed(
            f"with {end} as EOS, prompt {i + 1} gave {stopped[i].ids} (finished: {stopped[i].finished}) instead of "
            f"{expected[i]}",
            "the engine must stop at the first EOS of the completion, keep it, and ignore those in the prompt",
            len(wrong),
            0,
        )
    return passed(0, 0)


def eos_loss(subject: Subject) -> Finding:
    """EOS belongs to the completion: the score stands on it, and the loss has a gradient there."""
    batch, outputs = subject.rollout, []

    def watched(batch: Sequences, *, train_policy: bool = True) -> Any:
        out = subject.in_fp32(batch, train_policy=train_policy)
        outputs.append(out.logprobs)
        return out

    settings = UpdateSettings(1, 1, len(batch), 0.2, None, 0.1, 1.0)
    loss = minibatch_loss(
        watched, batch, settings=settings, train_policy=True, sums=(TokenSums(),), must_be_same_policy=False
    )
    (gradient,) = torch.autograd.grad(loss, outputs)
    rows, last = torch.arange(len(batch), device=subject.device), batch.completion_lengths - 1
    lengths = torch.tensor([len(drawn.ids) for drawn in subject.ragged], device=subject.device)
    lost = (batch.completion_mask.sum(1) != lengths) | (gradient[rows, last] == 0)
    shaped = batch.rewards[rows, last] + 0.05 * ops.kl_k1(batch.logprobs, batch.ref_logprobs)[rows, last]
    lost |= (shaped - batch.scores).abs() > 1e-4 * (1 + batch.scores.abs())
    return within(
        int(lost.sum()),
        0,
        cause=f"in {int(lost.sum())} of {len(batch)} completions the last token is outside the mask, without score or "
        "without gradient: the model would never learn to end",
        advice="masks must come from lengths that count EOS, never from `ids != pad`",
    )


def accumulation(subject: Subject) -> Finding:
    """Gradients of one micro-batch with all rows equal those of micro-batches of 3, policy and value."""
    batch = subject.rollout
    whole = run_update(subject.in_fp32, batch, micro_batch_size=len(batch), learning_rate=0.0)
    split = run_update(subject.in_fp32, batch, micro_batch_size=3, learning_rate=0.0)
    gaps = {role: _relative_gap(whole, split, role) for role in ("policy.", "value.")}
    return within(
        max(gaps.values()),
        1e-3,
        cause=f"splitting the batch changes the gradient of the policy by {gaps['policy.']:.1e} and of the value by "
        f"{gaps['value.']:.1e} of its length",
        advice="sum the loss over tokens and divide by the token count of the whole optimiser batch",
    )


def gradients(subject: Subject) -> Finding:
    """Every weight matrix that is trained, adapters included, gets a gradient."""
    found = subject.stepped.gradients
    trained = {name: w for name, w in subject.stepped.model.named_parameters() if w.requires_grad and w.ndim > 1}
    if not any(name.startswith("policy.") for name in trained):
        return failed("no weight of the policy is trainable", "load it with models.load_policy(..., trainable=...)")
    lost = [name for name in trained if name not in found or not found[name].any()]
    return within(
        len(lost),
        0,
        cause=f"{len(lost)} of {len(trained)} trained weights get no gradient, {lost[0] if lost else ''} among them",
        advice="with peft, run backward before another adapter is switched on (set_adapter): the switch cuts the first "
        "adapter off without a word; else take weights that the forward does not use out of training",
    )


def frozen(subject: Subject) -> Finding:
    """An update moves no weight outside `trainable`: not the lower layers, not embeddings through a tied head."""
    moved, trainable = subject.stepped.moved, subject.trainable
    if trainable == "full":
        return skipped("everything is trained")
    if trainable == "lora" or isinstance(trainable, Lora):
        wrong = [name for name in moved if "lora_" not in name and "modules_to_save" not in name]
    else:
        count = trainable.last_layers if isinstance(trainable, LastLayers) else 0
        wrong = sorted(moved & _below(subject.stepped.model.policy, count))
    return within(
        len(wrong),
        0,
        cause=f"{len(wrong)} weights below what is trained have moved, {wrong[0] if wrong else ''} among them"
        + (": the LM head is tied to the embeddings" if any("embed" in n or "wte" in n for n in wrong) else ""),
        advice="choose what is trained with models.choose_trainable, which freezes a tied head or unties it",
    )


def trunk(subject: Subject) -> Finding:
    """The frozen trunk gives bit for bit the same states after an update, and the branch above reads nothing else."""
    gap = subject.stepped.trunk_gap
    if gap is None:
        return skipped("no layer is frozen below one that is trained")
    if gap > 0:
        return failed(
            "an update changes the states of the frozen trunk, which reference, value and reward share",
            "see `frozen`; a model whose layers share weights cannot be split: use `trainable: full` or `lora`",
            gap,
            0.0,
        )
    return within(
        branch_gap(subject.policy, subject.sequences),
        ROUNDING,
        cause="the layers above the frozen trunk read more than its output: with that alone they give other logits",
        advice="its layers share keys or states, so its trunk cannot be computed once for policy, reference and value: "
        "use `trainable: full` or `lora`",
    )


def reference(subject: Subject) -> Finding:
    """The reference is the policy before the first update, and does not follow it."""
    batch, followed = subject.rollout, subject.stepped.reference_gap
    gap = max(largest(batch.logprobs - batch.ref_logprobs), followed)
    return within(
        gap,
        0.0,
        cause=f"the reference differs from the policy at the start, or moved with it by up to {followed:.1e}",
        advice="take the reference with models.frozen_copy before the first update",
    )


def save(subject: Subject) -> Finding:
    """Saved and loaded, by this project (adapter merged and not) and by transformers alone, it is the same model."""
    policy, tokenizer = subject.stepped.model.policy, subject.tokenizer
    expected, gaps, causes = _logits(policy, subject), {}, {}
    with tempfile.TemporaryDirectory(prefix="rlhf-check-") as temporary:
        folder = Path(temporary) / "model"
        terms = text.contract_of(
            tokenizer, eos_token_ids=subject.eos_token_ids, max_prompt_tokens=1, max_completion_tokens=1
        )
        models.save_model(policy, tokenizer, folder, contract=terms)
        for how, load in _ways_to_load(folder, tokenizer).items():
            again = load().to(subject.device).eval()
            gaps[how] = largest(_logits(again, subject) - expected) / max(largest(expected), 1.0)
            causes[how] = "" if gaps[how] <= ROUNDING else check_causes.of_loading(policy, again)
            del again
    worst = max(gaps, key=lambda how: gaps[how])
    return within(
        gaps[worst],
        ROUNDING,
        cause=f"the model is another one after saving and loading it {worst}{causes[worst]}",
        advice="save with models.save_model; weights that were tied, resized or merged in memory must lie in the file",
    )


# ---------------------------------------------------------------- parts


@torch.no_grad()
def _unpadded_logprobs(subject: Subject) -> list[Tensor]:
    """Of each completion, by the bare model on one row of ids: no padding, no mask, no positions given."""
    return [
        ops.token_logprobs(logits[None], torch.tensor([drawn.ids], device=logits.device), temperature=1.0)[0]
        for logits, drawn in zip(check_causes.rows_of_logits(subject, subject.ragged), subject.ragged, strict=True)
    ]


def _wrong_end(subject: Subject) -> str:
    """How a completion of the subject's own engine ended, if not as it should."""
    ends = subject.eos_token_ids
    for number, drawn in enumerate(subject.sampled, 1):
        early = next((i for i in drawn.ids[:-1] if i in ends), None)
        if early is not None:
            return f"completion {number} goes on after EOS ({early}): generation stops at another id than {list(ends)}"
        if not drawn.ids or (len(drawn.ids) < SAMPLED_TOKENS and drawn.ids[-1] not in ends):
            last = f"after {drawn.ids[-1]}, which is no EOS {list(ends)}" if drawn.ids else "before its first token"
            return f"completion {number} stops {last}"
        if drawn.finished != (drawn.ids[-1] in ends):
            return f"completion {number} ends with {drawn.ids[-1]}, yet the engine says finished: {drawn.finished}"
    return ""


def _sampled_until(subject: Subject, ends: tuple[int, ...]) -> list[Any]:
    # the engine puts what it samples from into evaluation mode: not the subject, whose weights the twin shares
    twin = copy.deepcopy(subject.policy, {id(weight): weight for weight in subject.policy.parameters()})
    engine = engine_for(
        twin,
        eos_token_ids=ends,
        pad_token_id=subject.tokenizer.pad_token_id,
        dtype=torch.float32,
        batch_size=4,
    )
    generator = torch.Generator().manual_seed(1)
    prompts = subject.prompt_ids[-4:]  # those with EOS in them
    return engine.generate(prompts, max_tokens=MAX_TOKENS, temperature=1.0, generator=generator)


def _relative_gap(one: dict[str, Tensor], other: dict[str, Tensor], role: str) -> float:
    """Length of the difference of two gradients, over the length of the first; NaN where there is none."""
    names = [name for name in one if name.startswith(role)]
    squares = sum(float((one[name] - other[name]).norm(dtype=torch.float64)) ** 2 for name in names)
    length = sum(float(one[name].norm(dtype=torch.float64)) ** 2 for name in names)
    return (squares / length) ** 0.5 if length > 0 else float("nan")


def _below(policy: Any, count: int) -> set[str]:
    """Names of the weights of the embedding and of all layers but the top `count`."""
    _, layers = models.layers_of(policy)
    modules = [policy.get_input_embeddings(), *layers[: len(layers) - count]]
    ids = {id(weight) for module in modules for weight in module.parameters()}
    return {name for name, weight in policy.named_parameters() if id(weight) in ids}


@torch.no_grad()
def _logits(model: Any, subject: Subject) -> Tensor:
    """Of the longest prompt."""
    return model(input_ids=torch.tensor([max(subject.prompt_ids, key=len)], device=subject.device)).logits.float()


def _ways_to_load(folder: Path, tokenizer: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained
    ways: dict[str, Any] = {"with transformers": lambda: plain(str(folder), dtype=torch.float32)}
    ways["with rlhf"] = lambda: models.load_policy(str(folder), tokenizer)
    if models.is_adapter(folder):
        ways["with rlhf, to train its adapter on"] = lambda: models.load_policy(
            str(folder), tokenizer, trainable="lora"
        )
    return ways

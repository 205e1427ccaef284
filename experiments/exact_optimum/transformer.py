"""World B: a small transformer through the complete `ppo.train`, tokenizer, text reward and checkpoint included.

The prompt, the padding token and the EOS are ordinary words of its vocabulary: the policy may sample its own padding,
which only masks that come from lengths survive.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.exact_optimum import exact
from experiments.exact_optimum.exact import EOS, World
from rlhf import ppo, text
from rlhf.actor_critic import ActorCritic
from rlhf.config import PPOConfig, Tracking
from rlhf.sequences import Sequences
from rlhf.types import Prompt
from rlhf.update import demonstration_loss

WORDS = ("<eos>", "a", "b", "c", "d", "e", "f", "<pad>")
MAX_TOKENS = 4
PROMPT = "f"
MISSING_EOS_PENALTY = 1.0


def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Every `a` is worth a point, every `b` costs half a point, and length costs too."""
    words = [completion.split() for completion in completions]
    return [said.count("a") - 0.5 * said.count("b") - 0.2 * len(said) for said in words]


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[-1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=WORDS[EOS], pad_token=WORDS[-1])


def reference(seed: int) -> Any:
    """The start and reference: a Llama of two layers, fitted for 200 steps to samples of a random bigram chain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=len(WORDS) - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        chain = torch.randn(len(WORDS), len(WORDS))
        chain[:, EOS] += 0.3
        _fit(model, chain)
    return model


def _fit(model: Any, chain: Tensor, *, steps: int = 200, batch_size: int = 256) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prompt = text.encode_prompt(tokenizer(), PROMPT)
    for _ in range(steps):
        said = torch.full((batch_size, 1), prompt[-1])
        for _ in range(MAX_TOKENS):
            said = torch.cat([said, chain[said[:, -1]].softmax(-1).multinomial(1)], dim=1)
        completions = [_up_to_eos(row) for row in said[:, 1:].tolist()]
        batch = Sequences.from_lists([prompt] * batch_size, completions, pad=len(WORDS) - 1)
        demonstration_loss(as_token_model(model), batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def _up_to_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def as_token_model(model: Any) -> ActorCritic:
    """The policy as the product measures it, in fp32 and without a value."""
    return ActorCritic(model, None, temperature=1.0, dtype=torch.float32)


def world(model: Any) -> World:
    """Every completion of the prompt, with what PPO is told of it: the reward, less the penalty for a missing EOS."""
    words = tokenizer()
    prompt = text.encode_prompt(words, PROMPT)
    sequences = exact.all_sequences(len(WORDS), MAX_TOKENS, prompt=prompt, pad=len(WORDS) - 1)
    found = exact.completions(len(WORDS), MAX_TOKENS)
    scores = torch.tensor(reward([], [text.decode_completion(words, ids) for ids in found])).double()
    cut = torch.tensor([ids[-1] != EOS for ids in found])
    return World(sequences, scores - MISSING_EOS_PENALTY * cut, exact.logprobs_of(as_token_model(model), sequences))


def train(model: Any, *, beta: float, seed: int, updates: int) -> Any:
    """Run `ppo.train` on a copy of the reference; returns the trained model."""
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output=str(Path(folder) / "ppo"),
            total_episodes=updates * 256,
            batch_size=256,
            num_mini_batches=1,
            micro_batch_size=128,
            num_ppo_epochs=4,
            learning_rate=1e-3,
            value_learning_rate=1e-3,
            value_warmup_steps=5,
            kl_coef=beta,
            max_completion_tokens=MAX_TOKENS,
            missing_eos_penalty=MISSING_EOS_PENALTY,
            rollout_batch_size=256,
            save_every=updates,
            precision="fp32",
            seed=seed,
            tracking=Tracking(wandb="off"),
        )
        return ppo.train(config, policy=model, tokenizer=tokenizer(), reward=reward, prompts=[PROMPT]).policy

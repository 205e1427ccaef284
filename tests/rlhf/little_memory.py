"""Started by `test_out_of_memory.py`: a run with micro-batches of 2, and one of 16 with too little memory for them."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from rlhf import models, ppo
from tests.conftest import make_tokenizer
from tests.rlhf import ppo_world as world
from tests.rlhf import tiny

WIDE = 2**16
"""Of the feed-forward layers: a token costs a megabyte, and a micro-batch of 16 rows some hundreds."""
SPARE = 160 * 2**20
"""Bytes that the second run may take beside what the first has left."""


def train(folder: Path, name: str, micro_batch_size: int) -> None:
    """Two steps of 16 completions, one minibatch each."""
    tokenizer = make_tokenizer()
    ppo.train(
        world.config(
            folder / name,
            total_episodes=32,
            batch_size=16,
            num_mini_batches=1,
            micro_batch_size=micro_batch_size,
            rollout_batch_size=2,
            max_completion_tokens=8,
            value_warmup_steps=0,
        ),
        policy=models.load_policy(str(folder / "start"), tokenizer, trainable="full"),
        tokenizer=tokenizer,
        reward=world.length_reward,
        prompts=world.TEXTS,
    )


def main(folder: Path) -> None:
    """Both runs, in folders of their own."""
    torch.set_num_threads(1)
    model = tiny.build("llama", num_hidden_layers=2, hidden_size=16, intermediate_size=WIDE)
    for layer in model.model.layers:
        for weight in layer.mlp.parameters():
            weight.data *= 0.05  # so many terms are summed that they would drown everything else
    model.save_pretrained(folder / "start")
    make_tokenizer().save_pretrained(folder / "start")
    train(folder, "small", 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    train(folder, "large", 16)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

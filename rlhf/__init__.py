"""From human rankings to an aligned language model. Imports nothing: write `from rlhf import ppo, sft`."""

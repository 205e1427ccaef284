"""PPO against the last PPO trainer of TRL, in one run."""

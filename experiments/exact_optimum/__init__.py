"""Worlds so small that the best policy is known: does the project's PPO find it? See README.md beside this file."""

"""Runs that can be repeated: each folder holds its data, configs and what came out."""

"""The demo: positive film reviews from simulated annotators' rankings."""

"""Whether the numbers about annotators can be trusted."""

"""Evaluation: held-out losses, the prompt matrix, benchmarks and lm-eval tasks."""

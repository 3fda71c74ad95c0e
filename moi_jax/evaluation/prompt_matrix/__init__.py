"""The held-out prompt matrix: every held-out conversation under its domain's prompts."""

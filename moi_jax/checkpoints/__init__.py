"""Checkpoints: our format, opening one, and (hf/) published files in and out."""

"""Checkpoints: our format, the opener, and (in hf/) import and export of published files."""

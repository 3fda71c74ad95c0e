"""Published checkpoints: import, export and verification of weights, tokenizers and cards."""

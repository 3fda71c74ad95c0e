"""Published checkpoints: weights, tokenizers and cards in and out."""

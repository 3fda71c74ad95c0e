"""Data: conversations from files, rendered, tokenised, cached, mixed, packed and loaded."""

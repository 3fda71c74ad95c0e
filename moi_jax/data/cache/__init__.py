"""Conversations rendered and tokenised once, kept on disk, and what of them is trained on."""

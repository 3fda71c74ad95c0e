"""Conversations as text and tokens: tokenizers, chat templates, rendering, prompts."""

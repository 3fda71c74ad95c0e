"""The cache: conversations are rendered and tokenised once and kept on disk."""

"""Rows of files and datasets in, one `Conversation` or `BadRow` out for each."""

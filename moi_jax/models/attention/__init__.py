"""Attention inside segments, one file a backend."""

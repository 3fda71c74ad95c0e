"""Runs generated programs in isolation and tests them from another process."""

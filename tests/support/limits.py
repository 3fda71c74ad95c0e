"""The batches on devices over which a watch is held."""

from contextlib import contextmanager

import pytest

from moi_jax.parallel import stuck

SECONDS = 700


def watched_batches(patch: pytest.MonkeyPatch) -> list[int]:
    """From now on a batch is limited; returns the list to which each one adds its limit."""
    limits: list[int] = []

    @contextmanager
    def watching(seconds, should_stop):
        limits.append(seconds)
        yield should_stop

    patch.setattr(stuck, "ending_when_stuck", watching)
    patch.setattr(stuck, "_batch_seconds", SECONDS)
    return limits

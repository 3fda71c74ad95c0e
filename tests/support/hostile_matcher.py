"""A matcher of benchmark questions that kills the worker process it runs in, or is slow."""

import multiprocessing
import os
import signal
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from moi_jax.data.cache import prepare as cache_module


@dataclass(frozen=True)
class Hostile:
    """In the place of the benchmarks' matcher: something that happens to a worker at every text."""

    what: str
    fingerprint: str = ""
    questions: int = 0
    skipped: tuple[str, ...] = ()

    def hit(self, text: str) -> None:
        if self.what == "kill" and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)


def hostile(monkeypatch: pytest.MonkeyPatch, root: Path, what: str) -> dict[str, str]:
    """The decontaminate section under which it happens."""
    reader = types.SimpleNamespace(read=lambda directory: Hostile(what))
    monkeypatch.setattr(cache_module, "Benchmarks", reader)
    return {"path": str(root)}

"""Goodput: where the wall-clock time of a run went, over all its processes and restarts."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import jax

# What the time of a run is spent on. Every second counts once.
PARTS = {
    "step": "training steps",
    "compile": "compiling programs",
    "data_wait": "waiting for the next batch",
    "evaluation": "held-out losses, benchmarks, sample answers",
    "checkpoint": "saving, as far as the run waits for it",
    "profile": "writing a trace",
    "start": "reading weights, preparing data, planning",
    "lost": "work that a restart repeats",
    "down": "between two processes",
}
# What jax does before a program can run. A trace may lie within another one.
COMPILING = {
    f"/jax/core/compile/{stage}_duration"
    for stage in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
}


class Clock:
    """Adds up the seconds of a run by what they are spent on.

    Every record of metrics.jsonl has the sums, and a resumed run goes on from them. Checkpoints do
    not have them: they are the same, however often a run was interrupted.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._now = now
        self._thread = threading.get_ident()
        self._part = "start"
        self._started = self._since = now()
        self._compiled: list[tuple[float, float]] = []  # spans of the running part

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Counts what jax compiles in the block, in the thread that made the clock."""
        jax.monitoring.register_event_duration_secs_listener(self.on_event)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(self.on_event)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block for one of PARTS, and not for the part around it."""
        around = self._part
        self._enter(name)
        try:
            yield
        finally:
            self._enter(around)

    def on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Notes what jax has just compiled: it does not count for the part in which it happened."""
        if event not in COMPILING or threading.get_ident() != self._thread:
            return
        end = self._now()
        # jax takes the duration from the wall clock, which may jump.
        start = min(max(end - duration_secs, self._since), end)
        while self._compiled and self._compiled[-1][0] >= start:
            self._compiled.pop()  # it lies within the new span
        self._compiled.append((start, end))

    def record(self) -> dict[str, Any]:
        """The keys for a record of metrics.jsonl: the sums up to now, and when this is."""
        self._enter(self._part)
        whole = sum(self.seconds.values())
        return {
            **{f"time/{part}": round(seconds, 3) for part, seconds in self.seconds.items()},
            "goodput": round(self.seconds["step"] / whole, 4) if whole else 0.0,
            "written": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }

    def go_on(self, kept: Mapping[str, Any], last: Mapping[str, Any]) -> None:
        """Adds the time before this process.

        Args:
          kept: the last record up to the checkpoint from which the run goes on; {} without one.
          last: the last record of all. What came after `kept` is repeated. {} in a new run.
        """
        before, until = ({part: r.get(f"time/{part}", 0.0) for part in PARTS} for r in (kept, last))
        worked = [sum(sums.values()) - sums["down"] for sums in (before, until)]
        before["lost"] += max(worked[1] - worked[0], 0.0)
        before["down"] = until["down"]
        if "written" in last:
            since = (datetime.now(UTC) - datetime.fromisoformat(last["written"])).total_seconds()
            before["down"] += max(since - (self._now() - self._started), 0.0)
        self.seconds = {part: self.seconds[part] + before[part] for part in PARTS}

    def _enter(self, part: str) -> None:
        """Counts the time since the last call for the running part, and begins the next one."""
        now = self._now()
        compiled = sum(end - start for start, end in self._compiled)
        self.seconds["compile"] += compiled
        self.seconds[self._part] += now - self._since - compiled
        self._part, self._since = part, now
        self._compiled.clear()

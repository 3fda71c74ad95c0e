"""Signals that ask a command to stop: it saves what it can, then leaves."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Notes a SIGTERM or SIGINT while `watching`; the run then saves and ends.

    A second signal, or `grace_seconds` going by, ends the process as it is: a scheduler that
    kills then finds the last whole checkpoint.
    """

    def __init__(self, grace_seconds: int):
        self._grace_seconds = grace_seconds
        self.received: signal.Signals | None = None

    @contextmanager
    def watching(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that tells whether a signal came."""
        before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield lambda: self.received is not None
        finally:
            if self.received is None:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        deadline = threading.Timer(self._grace_seconds, os._exit, [self.exit_status])
        deadline.daemon = True
        deadline.start()

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells count it, so that schedulers start the run again."""
        return 128 + self.received if self.received else 0

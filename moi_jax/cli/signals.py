"""Signals that ask a command to stop: it saves its state and ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Notes a SIGTERM or SIGINT while `watching`; the run then saves and ends.

    A second signal, or the end of `grace_seconds`, ends the process at once; the last complete
    checkpoint stays.
    """

    def __init__(self, grace_seconds: int):
        self._grace_seconds = grace_seconds
        self.received: signal.Signals | None = None

    @contextmanager
    def watching(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that says whether a signal came."""
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
        """128 + the signal's number, as shells count; schedulers then start the run again."""
        return 128 + self.received if self.received else 0

"""SIGTERM and SIGINT: they end a command at once, or after a run has saved its state."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from moi_jax.cli.hosts import tell_hosts
from moi_jax.common.atomic_files import remove_unfinished

STOPPING = (signal.SIGTERM, signal.SIGINT)
# How long the main thread may be away from Python, as in a compilation, before a signal ends the
# process without it.
AWAY_SECONDS = 1
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

Handler = Callable[[int, FrameType | None], None]


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
        """Yields a function that says whether the run must stop.

        Where other processes take part, one of them may have got the signal. All then stop at the
        same call.
        """
        from moi_jax.parallel.agreed_stop import agreed_stop

        with (
            _handling(self._note, self._grace_seconds),
            agreed_stop(lambda: self.received, self._hear) as should_stop,
        ):
            yield should_stop

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in _heeded():
            signal.signal(each, signal.SIG_DFL)

    def _hear(self, number: int) -> None:
        """Notes a signal that another process got."""
        self.received = signal.Signals(number)

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells count; schedulers then start the run again."""
        return 128 + self.received if self.received else 0


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Lets a signal end the process in the block.

    It raises no exception: one within an import or a callback is lost, or crashes Python.
    """
    with _handling(lambda number, _: _end(number), AWAY_SECONDS):
        yield


def interrupts_end_answers() -> None:
    """From now on SIGINT raises KeyboardInterrupt and does no more, as often as it comes."""
    if signal.SIGINT in _heeded():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped_by(number: int) -> str:
    """The line about a command that a signal ended."""
    return f"stopped by {signal.Signals(number).name}; to go on, give the same command again"


def _heeded() -> list[signal.Signals]:
    """The signals that the parent does not ignore; those stay ignored.

    A shell's script starts `command &` without SIGINT, so that Ctrl-C does not reach it.
    """
    return [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]


def _end(number: int) -> None:
    with _ending:  # else `_end_late` would cut off a main thread that still tells the others
        try:
            remove_unfinished()
            cursor = SHOW_CURSOR if sys.stderr and sys.stderr.isatty() else ""
            with suppress(OSError):
                os.write(2, f"{cursor}{stopped_by(number)}\n".encode())
            tell_hosts(128 + number, stopped_by(number))
        finally:
            os._exit(128 + number)


# Reentrant, so that a second signal, whose handler runs in the same thread, ends it at once.
_ending = threading.RLock()


@contextmanager
def _handling(handler: Handler, grace_seconds: int) -> Iterator[None]:
    """Lets the first signal call `handler` in the main thread.

    Python calls it only when the main thread is back in Python. So another thread notes a signal
    as it comes, and ends a process that is still there after `grace_seconds` or a second signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_late, args=(reader, grace_seconds), daemon=True).start()
    before = {number: signal.signal(number, handler) for number in _heeded()}
    try:
        yield
    finally:
        if all(signal.getsignal(number) != signal.SIG_DFL for number in before):  # none came
            for number, old in before.items():
                signal.signal(number, old)
            signal.set_wakeup_fd(outer)
            os.close(writer)


def _end_late(reader: int, grace_seconds: int) -> None:
    with open(reader, "rb", buffering=0) as signals:
        while came := signals.read(1):
            number = came[0]
            chat = signal.getsignal(number) is signal.default_int_handler
            if number in STOPPING and not chat:
                select.select([signals], [], [], grace_seconds)
                _end(number)


# A forked process has the handlers too, but its signals are not those of this process.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

"""Ends a process whose main thread does not come back, as from a collective that hangs."""

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moi_jax.common.errors import LOST
from moi_jax.parallel import hosts
from moi_jax.parallel.watch import AGAIN


@contextmanager
def ending_when_stuck(
    seconds: int, should_stop: Callable[[], bool]
) -> Iterator[Callable[[], bool]]:
    """Yields `should_stop`, whose calls are the signs that the main thread goes on.

    If no call comes for `seconds`, the process shows where all of its threads are, and ends.

    Args:
      seconds: 0 means no limit.
    """
    if not seconds:
        yield should_stop
        return
    ended, called = threading.Event(), threading.Event()

    def watch() -> None:
        # In parts, so that a process that was suspended is not taken for one that is stuck.
        parts = 10
        while not ended.is_set():
            called.clear()
            if not any(called.wait(seconds / parts) or ended.is_set() for _ in range(parts)):
                _end(seconds)

    def sign() -> bool:
        called.set()
        return should_stop()

    threading.Thread(target=watch, daemon=True, name="stuck").start()
    try:
        yield sign
    finally:
        ended.set()
        called.set()


_batch_seconds = 0


def limit_batches(seconds: int) -> None:
    """Ends the process from now on if a `limited_batch` takes longer; 0 means no limit."""
    global _batch_seconds
    _batch_seconds = seconds


@contextmanager
def limited_batch() -> Iterator[None]:
    """Watches over one batch on the devices, where a command has called `limit_batches`.

    The loop of a run does not need it, since it watches over all that it does.
    """
    with ending_when_stuck(_batch_seconds, lambda: False):
        yield


def _end(seconds: int) -> None:
    line = f"stuck: no step, batch or save ended for {seconds} s (cluster.stuck_seconds){AGAIN}"
    try:
        faulthandler.dump_traceback(all_threads=True)
        os.write(2, f"error: {line}\n".encode())
        if joined := hosts.joined():
            joined.watch.tell(LOST, line)
    finally:
        os._exit(LOST)

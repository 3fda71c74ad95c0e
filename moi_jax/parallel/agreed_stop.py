"""A stop on which all processes agree: each of them stops at the same call.

The processes run the same program, so call n of `should_stop` is at the same place in all of them.
But one may be some calls ahead of another. When one is asked to stop, each publishes how many calls
it has made, and all stop at the call after the highest number.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from moi_jax.parallel import hosts

LISTENER = "agreed_stop"  # the name of a thread that waits until a stop is asked for
LISTEN_SECONDS = 1.0  # how long it waits at a time


@contextmanager
def agreed_stop(
    asked: Callable[[], int | None], tell: Callable[[int], None]
) -> Iterator[Callable[[], bool]]:
    """Yields `should_stop`, which all processes call at the same places of the program.

    Args:
      asked: returns the signal that asked this process to stop, or None.
      tell: called with the signal that another process got, when this one is about to stop.
    """
    joined = hosts.joined()
    if joined is None:
        yield lambda: asked() is not None
        return
    agreement = Agreement(joined, asked)

    def should_stop() -> bool:
        if reached := agreement.reached():
            tell(agreement.signal)
        return reached

    try:
        yield should_stop
        # Until all are here, this process answers one that is asked to stop.
        hosts.wait_for_all("the last step")
    finally:
        agreement.end()


def end_listeners() -> None:
    """Returns when no thread of an ended agreement waits for a message any more.

    A thread that comes back from jax's store while Python is ending would abort the process.
    """
    for thread in threading.enumerate():
        if thread.name == LISTENER:
            thread.join(2 * LISTEN_SECONDS)


class Agreement:
    """The count of the calls of one process, and the call at which all processes stop."""

    def __init__(self, joined: hosts.Hosts, asked: Callable[[], int | None]):
        self._hosts, self._asked = joined, asked
        self.key = joined.new_key("a stop")
        self._calls = 0
        self._last: int | None = None  # the call at which all stop
        self.signal = 0
        # Held while the processes agree, so that none of them makes a call meanwhile. They answer
        # from this thread, since their main threads may be waiting for each other in a step.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True, name=LISTENER).start()

    def reached(self) -> bool:
        """Counts a call; returns whether it is the one at which all processes stop."""
        with self._lock:
            self._calls += 1
            if number := self._asked():
                self.ask(number)
            return self._last is not None and self._calls >= self._last

    def ask(self, number: int) -> None:
        """Asks all processes to stop; `number` is their signal unless another one asked before."""
        with suppress(Exception):  # another process was asked before
            self._hosts.store.key_value_set(f"{self.key}/signal", str(int(number)))

    def end(self) -> None:
        """No more calls will come."""
        self._ended.set()

    def _listen(self) -> None:
        store = self._hosts.store
        while not self._ended.is_set():
            with hosts.suppress_no_answer():
                number = store.blocking_key_value_get(
                    f"{self.key}/signal", int(1000 * LISTEN_SECONDS)
                )
                break
        else:
            return
        with self._lock:
            store.key_value_set(f"{self.key}/calls/{self._hosts.index}", str(self._calls))
            calls = [
                int(self._hosts.get(f"{self.key}/calls/{process}", process))
                for process in range(len(self._hosts.names))
            ]
            self.signal, self._last = int(number), max(calls) + 1

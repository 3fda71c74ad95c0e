"""Threads that stand for processes agree on a stop, whatever their pace and the moment."""

import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.parallel.agreed_stop import Agreement
from moi_jax.parallel.hosts import Hosts

from support.key_values import Store


class Steps:
    """Steps in lock step: a process may be ahead of the others by two, as jax dispatches steps."""

    def __init__(self, count):
        self._taken, self._changed = [0] * count, threading.Condition()

    def take(self, process):
        with self._changed:
            self._taken[process] += 1
            self._changed.notify_all()
            mine = self._taken[process]
            assert self._changed.wait_for(lambda: min(self._taken) >= mine - 2, 20)


@settings(max_examples=25, deadline=None)
@given(
    paces=st.lists(st.integers(0, 3), min_size=2, max_size=5),
    asked=st.dictionaries(st.integers(0, 4), st.integers(1, 30), min_size=1),
)
def test_all_stop_at_the_same_call(paces, asked):
    """`asked` is the call from which on a process is asked to stop; none is asked too late."""
    store, steps = Store(), Steps(len(paces))
    asked = {process % len(paces): call for process, call in asked.items()}
    calls = [0] * len(paces)

    def process(index):
        hosts = Hosts(store, index, [f"process {n}" for n in range(len(paces))], None)
        received = lambda: 15 if calls[index] >= asked.get(index, 10_000) else None  # noqa: E731
        agreement = Agreement(hosts, received)
        while not agreement.reached():
            calls[index] += 1
            steps.take(index)
            time.sleep(paces[index] / 5000)
        agreement.end()

    threads = [threading.Thread(target=process, args=(n,)) for n in range(len(paces))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(set(calls)) == 1
    assert calls[0] >= min(asked.values())

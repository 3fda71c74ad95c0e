"""Work that all processes do in their background, such as a save; it succeeds in all or in none.

If it fails in one process, that one publishes why. The others read it where they wait for each
other in their background, and give the work up. The main threads notice at the same call.
"""

import json
from collections import Counter
from contextlib import suppress
from time import monotonic
from typing import Any

from moi_jax.parallel.agreed_stop import Agreement
from moi_jax.parallel.hosts import Hosts, suppress_no_answer

PAUSE = 0.2  # seconds between two looks at whether another process has failed


class FailedElsewhere(Exception):
    """The work is given up here, since it has failed in another process."""


class SharedWork:
    """One piece of work. All processes make it at the same place of the program."""

    def __init__(self, joined: Hosts):
        self._hosts = joined
        self._agreement = Agreement(joined, lambda: None)
        self._waits: Counter[str] = Counter()

    def fail(self, failure: dict[str, Any]) -> None:
        """Publishes that the work has failed in this process; only the first failure counts.

        Args:
          failure: JSON; what the processes shall know of it.
        """
        text = json.dumps({**failure, "process": self._hosts.index})
        with suppress(Exception):  # another process failed before
            self._hosts.store.key_value_set(f"{self._agreement.key}/failure", text)
        self._agreement.ask(1)

    def failure(self) -> dict[str, Any] | None:
        """The first failure, with the number of its "process"; None if nothing has failed."""
        try:
            return json.loads(self._hosts.store.key_value_try_get(f"{self._agreement.key}/failure"))
        except Exception:  # jax's error for a key that is not there
            return None

    def failed(self) -> bool:
        """Whether the work has failed in any process. All get the same answer at the same call."""
        return self._agreement.reached()

    def wait_for_all(self, what: str, seconds: float, gives_up: bool) -> None:
        """Waits in a thread in the background until all processes are at the same place.

        Args:
          what: the place; it may be reached several times.
          seconds: how long the others may take.
          gives_up: whether a failure of another process ends the wait.

        Raises:
          FailedElsewhere: it does.
          TimeoutError: the others take longer.
        """
        deadline = monotonic() + seconds
        store, index, names = self._hosts.store, self._hosts.index, self._hosts.names
        self._waits[what] += 1
        key = f"{self._agreement.key}/{what}/{self._waits[what]}"
        store.key_value_set(f"{key}/{index}", "")
        # Process 0 waits for each, and the others for its word: each asks for few keys.
        for process in range(len(names)) if index == 0 else ["all"]:
            while not self._is_there(f"{key}/{process}"):
                if gives_up and self.failure():
                    raise FailedElsewhere
                if monotonic() > deadline:
                    raise TimeoutError(f"another host has not written after {seconds:.0f} s")
        if index == 0:
            store.key_value_set(f"{key}/all", "")

    def _is_there(self, key: str) -> bool:
        with suppress_no_answer():
            self._hosts.store.blocking_key_value_get(key, int(1000 * PAUSE))
            return True
        return False

    def succeed(self) -> None:
        """The work is done in all processes."""
        self._agreement.end()

    def forget(self) -> None:
        """Deletes what the processes have exchanged. Call it when all of them are long done."""
        if self._hosts.index == 0:
            self._hosts.store.key_value_delete(self._agreement.key)

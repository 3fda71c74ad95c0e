"""Watches over the processes of a run on many hosts, so that none of them waits for a lost one.

Each process gives a sign of life in the store of jax's coordination service, which process 0 runs.
If a process fails, it tells the others why. If one is killed, unreachable or suspended, process 0
notices that its signs stop. All the others then end, and each names the process that failed.
"""

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, NoReturn, Protocol

from moi_jax.common.atomic_files import remove_unfinished
from moi_jax.common.errors import LOST

# How long a process that failed waits until the others have heard of it.
TELL_SECONDS = 5
AGAIN = "; to go on, give the same command again on all hosts"


class Store(Protocol):
    """The key-value store that all processes share; jax's client has these methods."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_try_get(self, key: str) -> str: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Watch:
    """The watch of one process over the others; its two threads end with the process.

    One thread gives the signs of life and reads those of the others. It may hang where the network
    is cut, so another one judges it.
    """

    def __init__(self, store: Store, index: int, names: list[str], lost_seconds: float):
        """
        Args:
          index: the number of this process.
          names: of all processes, as they are shown.
          lost_seconds: a process that gives no sign for so long is lost.
        """
        self._store, self._index, self._names = store, index, names
        self._lost_seconds = lost_seconds
        self._pause = min(2.0, lost_seconds / 6)
        self._stopped = threading.Event()
        # Time is counted in pauses that this process was awake for. A process that was suspended
        # then does not believe that all others were silent meanwhile.
        self._pauses = 0
        self._answered = 0  # the pause at which the store answered last
        self._signs: dict[int, tuple[str, int]] = {}  # process -> its last sign, and the pause
        # Why this process ends: its status, and a line that is not shown yet. Only the first reason
        # counts: a process that waits until the others know may lose its connection meanwhile.
        self._ending: tuple[int, str] | None = None
        # What this process has shown of its own failure, in which all may agree, without its name.
        self.shown = ""
        for work in (self._beat, self._judge):
            threading.Thread(target=work, daemon=True, name=f"watch{work.__name__}").start()

    def stop(self) -> None:
        """Ends the watch: this process is done, and so are the others."""
        self._stopped.set()

    def tell(self, status: int, line: str) -> None:
        """Tells the others that this process fails, and waits a little until they know.

        If another process failed first, and for another reason, that one is named.

        Args:
          status: the exit status of this process, which will be that of the others, too.
          line: why, without its name.
        """
        if self._stopped.is_set():
            return
        line = f"stopped: {line}"
        # Before the others hear of it: process 0 leaves as soon as it does, and jax then aborts
        # this process.
        self._ending = status, ""
        failed = self._publish(self._index, status, line)
        if failed is None or failed["process"] == self._index or failed["line"] == line:
            self._stopped.set()
            self._note_told()
            self._wait_until_told({0, self._index})
        else:
            self._end_with(failed)

    def end_if_another_is_lost(self) -> None:
        """Waits where another process gives no signs of life; the watch then ends this one."""
        if self._stopped.is_set():
            return
        before = dict(self._read_signs())
        time.sleep(2.5 * self._pause)
        now = dict(self._read_signs())
        if len(now) == len(self._names) and all(before.get(key) != now[key] for key in now):
            return
        time.sleep(self._lost_seconds + 3 * self._pause)

    def _beat(self) -> None:
        number = 0
        while not self._stopped.wait(self._pause):
            number += 1
            with contextlib.suppress(Exception):  # it does not answer; `_judge` ends the wait
                self._store.key_value_set(f"moi_jax/sign/{self._index}", str(number), True)
                if failed := self._failed():
                    self._end_with(failed)
                if self._index == 0:
                    self._look_for_lost()
                self._answered = self._pauses

    def _judge(self) -> None:
        while not self._stopped.wait(self._pause):
            self._pauses += 1
            if self._silent(self._answered):
                self.end_without_coordinator(self._no_sign)

    def _silent(self, since: int) -> bool:
        return (self._pauses - since) * self._pause > self._lost_seconds

    def end_without_coordinator(self, why: str) -> NoReturn:
        """Ends this process: process 0, which runs the store, does not answer any more."""
        self._end(LOST, f"{self._names[0]} is lost: {why}{AGAIN}")

    def end_after_abort(self) -> NoReturn:
        """Ends this process, which jax aborts though process 0 is there: another one is not."""
        self._end(LOST, f"jax gave up, since another process is lost or came back alone{AGAIN}")

    def _look_for_lost(self) -> None:
        for process, sign in self._read_signs():
            last, _ = self._signs.get(process, ("", 0))
            if sign != last:
                self._signs[process] = sign, self._pauses
        for process in range(len(self._names)):
            _, since = self._signs.setdefault(process, ("", self._pauses))
            if self._silent(since):
                self._publish(process, LOST, f"is lost: {self._no_sign}{AGAIN}")

    @property
    def _no_sign(self) -> str:
        return f"it gave no sign of life for {self._lost_seconds:g} s"

    def _read_signs(self) -> list[tuple[int, str]]:
        found = self._store.key_value_dir_get("moi_jax/sign/")
        return [(int(key.rpartition("/")[2]), sign) for key, sign in found]

    def _publish(self, process: int, status: int, line: str) -> dict[str, Any] | None:
        """Publishes a failure unless there is one; returns the first, if it can be read."""
        record = json.dumps({"process": process, "status": status, "line": line})
        with contextlib.suppress(Exception):  # it is known already
            self._store.key_value_set("moi_jax/failed", record)
        return self._failed()

    def _failed(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._store.key_value_try_get("moi_jax/failed"))
        except Exception:  # jax's error for a key that is not there
            return None

    def _end_with(self, failed: dict[str, Any]) -> NoReturn:
        line = f"{self._names[failed['process']]} {failed['line']}"
        self._ending = failed["status"], "" if failed["line"] == f"stopped: {self.shown}" else line
        self._note_told()
        if self._index == 0:  # the store ends with this process
            self._wait_until_told({0, failed["process"]})
        self._end(*self._ending)

    def _note_told(self) -> None:
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"moi_jax/told/{self._index}", "", True)

    def _wait_until_told(self, apart_from: set[int]) -> None:
        deadline = time.monotonic() + TELL_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                told = self._store.key_value_dir_get("moi_jax/told/")
                processes = {int(key.rpartition("/")[2]) for key, _ in told} | apart_from
                if len(processes) == len(self._names):
                    return
            time.sleep(0.1)

    def _end(self, status: int, line: str) -> NoReturn:
        status, line = self._ending or (status, line)
        try:
            remove_unfinished()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                if line:
                    os.write(2, f"error: {line}\n".encode(errors="backslashreplace"))
        finally:
            os._exit(status)

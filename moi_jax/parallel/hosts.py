"""The processes of a run on many hosts: who this one is, and what all of them do together.

A process that was not joined to others (see `joining`) is process 0 of 1, and the functions here
return at once. All processes must call them in the same order, as they do with the steps of jax.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count as count_from
from pathlib import Path
from typing import Any, TypeVar

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.common.versions import code_versions
from moi_jax.parallel.watch import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")

# How often process 0 says whom it waits for, in seconds.
TELL_EVERY = 30


@dataclass
class Hosts:
    """The joined processes.

    Attributes:
      store: jax's client of the key-value store that all processes share.
      index: the number of this process.
      names: of all processes, such as "process 1 (node-2)".
      watch: ends this process if another one fails.
    """

    store: Any
    index: int
    names: list[str]
    watch: Watch
    _numbers: Iterator[int] = field(default_factory=count_from)
    _exchanged: list[str] = field(default_factory=list)  # keys of exchanges that are in the store

    def new_key(self, what: str) -> str:
        """A key for something new that the processes share; it is the same in all of them."""
        return f"moi_jax/{next(self._numbers)}/{what}"

    def exchange_key(self, what: str) -> str:
        """A key for one more exchange, which a later `gather` deletes."""
        self._exchanged.append(self.new_key(what))
        return self._exchanged[-1]

    def get(self, key: str, process: int) -> bytes:
        """Waits for the value that a process sets."""
        started = told = time.monotonic()
        while True:
            with suppress_no_answer():
                return self.store.blocking_key_value_get_bytes(key, 1000)
            now = time.monotonic()
            if self.index == 0 and now - told > TELL_EVERY:
                told = now
                what = key.split("/")[2]
                log.info(f"waiting for {self.names[process]}: {what} ({now - started:.0f} s)")

    def gather(self, what: str, value: str) -> list[str]:
        """The values of all processes."""
        key = self.exchange_key(what)
        self.store.key_value_set(f"{key}/{self.index}", value)
        values = [self.get(f"{key}/{n}", n).decode() for n in range(len(self.names))]
        # A process that has given its value here has done with all exchanges before.
        *done, _ = self._exchanged
        self._exchanged = [key]
        if self.index == 0:
            for old in done:
                self.store.key_value_delete(old)  # and what is below
        return values


@contextmanager
def suppress_no_answer() -> Iterator[None]:
    """Suppresses jax's error for a value that is not there yet.

    It also suppresses that the coordinator does not answer: the watch then ends this process.
    """
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        if not str(error).startswith(("DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED")):
            raise
        if not str(error).startswith("DEADLINE_EXCEEDED"):
            time.sleep(1)


_hosts: Hosts | None = None


def enter(hosts: Hosts | None) -> None:
    """Sets the processes to which this one was joined; None when it has left them."""
    global _hosts
    _hosts = hosts


def joined() -> Hosts | None:
    """The processes to which this one was joined; None if it is alone."""
    return _hosts


def process_index() -> int:
    """The number of this process. It starts no backend of jax, as `jax.process_index` does."""
    return _hosts.index if _hosts else 0


def is_main() -> bool:
    """Whether this is process 0, which alone writes what a run leaves on disk."""
    return process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when all processes are here; `what` is what they did before, for messages."""
    if _hosts:
        _hosts.gather(what, "")


def from_main(what: str, make: Callable[[], T]) -> T:
    """Calls `make` in process 0; all processes get the result, which must be JSON.

    Args:
      what: the result in a few words, for messages.
    """
    if _hosts is None:
        return make()
    key = _hosts.exchange_key(what)
    if is_main():
        text = json.dumps(make()).encode()
        _hosts.store.key_value_set_bytes(key, text)
    else:
        text = _hosts.get(key, 0)
    return json.loads(text)


def gather(what: str, value: T) -> list[T]:
    """The values of all processes, which must be JSON; all get the same list.

    Args:
      what: the values in a few words, for messages.
    """
    if _hosts is None:
        return [value]
    return list(map(json.loads, _hosts.gather(what, json.dumps(value))))


def in_all(what: str, true_here: bool) -> bool:
    """Whether something is true in every process; all get the same answer.

    Args:
      what: what is asked in a few words, for messages.
    """
    return all(gather(what, true_here))


def check_same_code(settings: Mapping[str, Any]) -> None:
    """Checks that all processes run the same code, with the same settings; see `check_same`."""
    # Also alone: a checkpoint records the code as it was at the start, not as it is edited later.
    versions = {f"version of {name}": value for name, value in code_versions().items()}
    check_same({**versions, **{f"setting {key}": value for key, value in settings.items()}})


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values.

    Args:
      values: name -> a JSON value; of what is large, better a fingerprint.

    Raises:
      UserError: they differ. The message names a process that differs from process 0, and how.
    """
    if _hosts is None:
        return
    texts = _hosts.gather("comparing code, config and data", json.dumps(values))
    first, *others = (json.loads(text) for text in texts)
    for name, other in zip(_hosts.names[1:], others, strict=True):
        for what in sorted(first.keys() | other.keys()):
            if (here := first.get(what)) != (there := other.get(what)):
                raise UserError(
                    f"{name} has another {what} than {_hosts.names[0]} ({there!s:.80}, not "
                    f"{here!s:.80}); give all hosts the same code, config and data"
                )


@contextmanager
def one_first(directory: Path, what: str) -> Iterator[None]:
    """Lets one process on each disk go first; the others follow when it has left the block.

    What the first one has written into the directory is then there for the others. Processes whose
    hosts share the disk of the directory have one that goes first; a host with a disk of its own
    has its own.

    Args:
      what: what the first one does, for messages.

    Raises:
      UserError: the directory cannot be written.
    """
    if _hosts is None:
        yield
        return
    first = _first_on_disk(_hosts, expand_home(directory))
    if _hosts.index != first:
        wait_for_all(what)
    yield
    if _hosts.index == first:
        wait_for_all(what)


def check_shared(directory: Path, key: str) -> None:
    """Checks that the directory, which exists, is the same on all hosts.

    Args:
      key: the key of the config that names it.

    Raises:
      UserError: a process does not share it with process 0.
    """
    if _hosts is None:
        return
    firsts = _hosts.gather("the shared directory", str(_first_on_disk(_hosts, directory)))
    for name, first in zip(_hosts.names, firsts, strict=True):
        if first != "0":
            raise UserError(
                f"{key} {directory} of {name} is not on the disk of {_hosts.names[0]}; name a "
                f"directory that all hosts share"
            )


def _first_on_disk(hosts: Hosts, directory: Path) -> int:
    """The lowest number of the processes that see the same directory as this one."""
    shared = from_main("a new name", lambda: uuid.uuid4().hex)
    mine = directory / f".{shared}.{hosts.index}.host"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mine.touch()
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}; name another") from None
    try:
        wait_for_all("the shared directory")
        seen = [n for n in range(len(hosts.names)) if (directory / f".{shared}.{n}.host").exists()]
        wait_for_all("the shared directory")
    finally:
        with suppress(OSError):
            mine.unlink()
    return min(seen)

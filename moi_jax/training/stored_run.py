"""A run whose directory is in an object store.

It works in a local copy of the directory as any run does, and process 0 sends to the store what
changes there. The copy is fetched first if it is not the newest: on a new machine, or where another
one has written since.
"""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moi_jax.checkpoints.items import all_steps
from moi_jax.checkpoints.stored_steps import StoredSteps
from moi_jax.common.errors import Unreachable, UserError
from moi_jax.common.locations import is_url
from moi_jax.config import Config
from moi_jax.parallel import hosts
from moi_jax.storage.lease import LEASE, STALE_SECONDS, Lease
from moi_jax.storage.store import Store
from moi_jax.training.run_directory import LOCK, OWNER, move_aside

SEND_SECONDS = 10.0  # between two looks at what has changed
STEPS, CONFIG = "checkpoints", "config.yaml"

log = logging.getLogger(__name__)


class LocalRun:
    """A run that is sent nowhere: its directory is local, or another process sends it."""

    def check(self) -> None:
        """Raises UserError if the run cannot go on because of the store."""

    def send(self) -> None:
        """Returns when the store holds what is in the local copy; raises UserError if it cannot."""

    def fetch_again(self, step: Path) -> bool:
        """Replaces a damaged step of the local copy; returns whether a sound one was there."""
        return False

    def checked(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """`should_stop` with a `check` before."""

        def checking() -> bool:
            self.check()
            return should_stop()

        return checking


class StoredRun(LocalRun):
    """A run that a thread sends to a store while it goes on."""

    def __init__(self, store: Store, steps: StoredSteps, lease: Lease, directory: Path):
        self._store, self._steps, self._lease = store, steps, lease
        self._directory = directory
        self._sent: dict[Path, tuple[int, int]] = {}  # file -> its state when it was sent
        self._failure: Exception | None = None
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_always, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._failure:
            raise self._failure
        self._lease.check()

    def send(self) -> None:
        with self._sending:
            self.check()
            try:
                self._send()
            except Exception as error:  # later calls raise it at once, and do not wait again
                self._failure = error
                raise

    def fetch_again(self, step: Path) -> bool:
        with self._sending:
            return self._steps.fetch_again(step)

    def end(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def _send_always(self) -> None:
        with suppress(Exception):  # told by the next `check`, whatever it is
            while not self._ended.wait(SEND_SECONDS):
                self.send()

    def _send(self) -> None:
        # Listed first: the metrics up to a step must be in the store before the step is.
        steps = all_steps(self._directory / STEPS)
        for file in self._files():
            self._send_file(file)
        self._steps.send(steps)

    def _files(self) -> Iterator[Path]:
        """The files beside the steps; the folders of these come and go."""
        for folder, folders, names in os.walk(self._directory):
            folders[:] = [name for name in folders if name != STEPS]
            for name in names:
                if _is_sent((Path(folder) / name).relative_to(self._directory)):
                    yield Path(folder) / name

    def _send_file(self, file: Path) -> None:
        """Sends a file if it has changed since it was sent."""
        with suppress(FileNotFoundError):  # it may go away
            if self._sent.get(file) != _state(file):
                content, state = _read_still(file)
                self._store.write(file.relative_to(self._directory).as_posix(), content)
                self._sent[file] = state


@contextmanager
def stored_run(
    config: Config, directory: Path, fresh: bool, strict_resume: bool
) -> Iterator[LocalRun]:
    """Connects a run with the store that logging.run_dir names, if it names one.

    Args:
      directory: the locked local directory. It then holds what the store has.
      fresh, strict_resume: see `train`.

    Raises:
      UserError: another run writes there, no checkpoint there is sound, or the store fails for
        longer than checkpoint.retry_seconds or refuses.
    """
    place, patience = config.logging.run_dir, config.checkpoint.retry_seconds
    if not is_url(place) or not hosts.is_main():
        yield LocalRun()
        return
    store = Store(place, patience)
    _check_place(store, fresh)
    log.info(f"{store.url}: the run works in its local copy {directory}")
    lease = Lease(store, _owner(directory), STALE_SECONDS)
    reachable, written = True, False
    try:
        store = Store(place, patience, lease.hold)
        steps = StoredSteps(place, patience, lease.hold)
        if not lease.continued or steps.are_newer(directory / STEPS):
            _fetch(store, steps, directory, strict_resume)
            (directory / OWNER).write_text(lease.owner)
        run, written = StoredRun(store, steps, lease, directory), True
        try:
            yield run
        except BaseException:
            with suppress(UserError):  # the first error is told
                run.send()
            raise
        else:
            run.send()
        finally:
            run.end()
    except Unreachable:
        reachable = False
        raise
    finally:
        lease.release(reachable, written)


def _check_place(store: Store, fresh: bool) -> None:
    names = set(store.names())
    if fresh and names - {LEASE}:
        raise UserError(
            f"--fresh moves an old run aside, which an object store cannot do; name another "
            f"logging.run_dir than {store.url}"
        )
    if names and not names & {LEASE, CONFIG}:
        raise UserError(
            f"{store.url} holds objects but is not a run directory; choose another logging.run_dir"
        )


def _owner(directory: Path) -> str:
    """What identifies a local copy. One that was not fetched to the end has none yet."""
    file = directory / OWNER
    return file.read_text() if file.is_file() else uuid.uuid4().hex


def _fetch(store: Store, steps: StoredSteps, directory: Path, strict: bool) -> None:
    """Makes the local copy anew from the store; the old one goes when the new one is whole."""
    (directory / OWNER).unlink(missing_ok=True)  # it is not the newest, also if this fails
    new = directory.with_name(f".{directory.name}.fetched")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        (new / STEPS).mkdir(parents=True)
        steps.fetch(new / STEPS, strict)
        store.fetch((name, new / name) for name in store.names() if _is_sent(Path(name)))
        if steps.lack_any(directory / STEPS):
            log.warning(
                f"{directory} has checkpoints that {store.url} has not; it is moved to "
                f"{move_aside(directory)}, and the run goes on from what the store has"
            )
        _replace(directory, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(directory: Path, new: Path) -> None:
    """Gives a directory the content of another one; it stays locked."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
    for entry in new.iterdir():
        entry.rename(directory / entry.name)


def _is_sent(file: Path) -> bool:
    """Whether a file of the run directory belongs into the store beside the steps.

    Hidden files and *.new are half written, or belong to this machine.
    """
    hidden = any(part.startswith((".", "/")) for part in file.parts)
    return not hidden and file.parts[0] != STEPS and file.suffix != ".new"


def _read_still(file: Path) -> tuple[bytes, tuple[int, int]]:
    """The content of a file that did not change while it was read, and its state."""
    while True:
        before, content = _state(file), file.read_bytes()
        if _state(file) == before:
            return content, before


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns

"""One writer below a URL: an object that its writer writes again and again, the heartbeat.

A store has no lock that ends with a process. Here an object says who writes. It is written only
over the generation that was read before, so of two who try, one succeeds. A lease whose heartbeat
stands still for `stale_seconds` may be taken; the one who takes it measures that time by a watch of
its own, so no clocks are compared.
"""

import json
import logging
import os
import platform
import threading
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.storage.store import Store, Version

LEASE = ".lease.json"
STALE_SECONDS = 60.0
BEATS = 6  # within the time after which a lease is stale

log = logging.getLogger(__name__)


class Lease:
    """The right to write below a URL. It is renewed in a thread until it is released or lost.

    Attributes:
      owner: see `__init__`.
      continued: whether the same owner held it last, so that nobody has written since then.
    """

    def __init__(self, store: Store, owner: str, stale_seconds: float):
        """Takes the lease; waits up to `stale_seconds` for the heartbeat of a holder.

        Args:
          owner: identifies the local copy of what is written. Its processes exclude each other by
            themselves, so that the next one need not wait for the lease of one that was killed.

        Raises:
          UserError: another writer holds it, or see `Store`.
        """
        self._store, self._stale_seconds = store, stale_seconds
        self.owner, self._host, self._beats = owner, platform.node(), 0
        self.continued, self._before = False, ""
        self._version = self._take()
        self._renewed = monotonic()
        self._failure: Exception | None = None
        self._renewing, self._released = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_always, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if another writer has taken the lease, or the store has failed."""
        if self._failure:
            raise self._failure

    def hold(self) -> None:
        """Returns if the lease is held now: call it before something is written.

        Raises:
          UserError: as `check`.
        """
        with self._renewing:
            self.check()
            # It is older where this process was suspended, or the store did not answer.
            if monotonic() - self._renewed > self._stale_seconds / 2:
                self._renew()

    def release(self, tell: bool = True, written: bool = True) -> None:
        """Lets others write. A lease that was lost stays with its new holder.

        Args:
          tell: write it to the store. Without this, the lease becomes stale by itself.
          written: if not, the holder before this one stays the one who has written last.
        """
        self._released.set()
        self._thread.join()
        self.owner = self.owner if written else self._before
        if tell and not self._failure:
            with suppress(UserError):  # it becomes stale by itself
                self._write(self._version, released=True)

    def _take(self) -> Version:
        """Writes the object over a lease that is free, our own, or stale."""
        version, since = self._store.version(LEASE), monotonic()
        told = False
        while True:
            found = _read(version)
            mine = (found.get("owner"), found.get("host")) == (self.owner, self._host)
            stale = monotonic() - since > self._stale_seconds
            if not found or found.get("released") or mine or stale:
                if taken := self._write(version):
                    self._before = found.get("owner", "")
                    self.continued = self._before == self.owner
                    return taken
            elif not told:
                told = True
                log.info(
                    f"{self._store.url} was last written by {found.get('host')}; waiting up to "
                    f"{self._stale_seconds:.0f} s for a sign of life of that run"
                )
            sleep(min(1.0, self._stale_seconds / (2 * BEATS)))
            before, version = version, self._store.version(LEASE)
            now = _read(version)
            if before.generation != version.generation and not now.get("released"):
                raise UserError(
                    f"{self._store.url} is in use by another run, on {now.get('host')}; "
                    f"wait for its end, or choose another logging.run_dir"
                )

    def _renew_always(self) -> None:
        while not self._released.wait(self._stale_seconds / BEATS):
            with self._renewing:
                try:
                    self._renew()
                except Exception as error:  # told by the next `check`, whatever it is
                    self._failure = error
                    return

    def _renew(self) -> None:
        started = monotonic()
        written = self._write(self._version)
        if written is None:
            raise UserError(
                f"another run has taken over {self._store.url} since this one was held up; wait "
                f"for its end, then give the same command again"
            )
        self._version, self._renewed = written, started

    def _write(self, before: Version, released: bool = False) -> Version | None:
        self._beats += 1
        mine: dict[str, Any] = {"owner": self.owner, "host": self._host, "process": os.getpid()}
        content = json.dumps({**mine, "beat": self._beats, "released": released}).encode()
        if written := self._store.write_over(before, LEASE, content):
            return written
        # A write whose answer was lost is tried again, and then finds its own object.
        now = self._store.version(LEASE)
        return now if now.content == content else None


def _read(version: Version) -> dict[str, Any]:
    """The content of the lease; {} where there is none, or it is no lease."""
    try:
        found = json.loads(version.content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

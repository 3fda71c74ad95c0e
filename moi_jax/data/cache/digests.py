"""Digests of source files, remembered in the cache so that a large file is hashed only once.

A file counts as unchanged if its size, inode, mtime and ctime are the same as when it was hashed.
A program cannot set the ctime, so only a write within the clock's resolution of the hashing could
be missed. Therefore a digest is remembered only if the file had not changed for a while before it
was read, and did not change while it was read.
"""

import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from moi_jax.data.cache.leftovers import PART
from moi_jax.data.sources.readers import SourceFile

REMEMBERED_BYTES = 2**23  # smaller files are hashed each time
STILL_SECONDS = 2.0


class Digests:
    """Digests by path, kept in the file `digests.json` of the cache directory."""

    def __init__(self, cache_dir: Path):
        self._path = cache_dir / "digests.json"
        try:
            self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            self._known = {}
        self._new: dict[str, list] = {}

    def of(self, file: SourceFile) -> str:
        """The digest of a file; the file is read only if its digest is not known."""
        if not file.path.is_file() or file.size < REMEMBERED_BYTES:
            return file.digest()
        name, before = str(file.path.resolve()), _state(file.path)
        known = self._known.get(name)
        if known and known[:-1] == before:
            return known[-1]
        digest = file.digest()
        still = time.time_ns() - max(before[2:]) > STILL_SECONDS * 1e9
        if still and _state(file.path) == before:
            self._new[name] = [*before, digest]
        return digest

    def save(self) -> None:
        """Writes the new digests to disk.

        They are lost, without harm, if another process writes at the same time or the cache is
        read-only.
        """
        if not self._new:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}{PART}")
            part.write_text(json.dumps({**self._known, **self._new}), encoding="utf-8")
            part.replace(self._path)


def _state(path: Path) -> list[int]:
    status: os.stat_result = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]

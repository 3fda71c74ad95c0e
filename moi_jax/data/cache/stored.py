"""A cache in an object store: what it has is fetched, and what is built here is sent to it.

Blocks and domains lie there under the names that they have on disk. A name tells the content, so
nothing is ever replaced there, and the machines of a job array share the cache without a lock.
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from moi_jax.common.locations import is_url
from moi_jax.data.cache.domain import BLOCKS
from moi_jax.data.cache.writer import COUNTS
from moi_jax.parallel import hosts
from moi_jax.storage.folders import (
    DamagedFolder,
    fetch_folder,
    folders_among,
    send_folder,
)
from moi_jax.storage.store import Store

log = logging.getLogger(__name__)


class LocalCache:
    """A cache that is on this disk alone."""

    def fetch(self, directory: Path, keys: Callable[[], Iterable[str]]) -> None:
        """Fetches a domain with its blocks, or else those of its blocks that the store has.

        What is on the disk already is not fetched.

        Args:
          directory: the folder of the domain.
          keys: the keys of its blocks.
        """

    def send(self, domains: Iterable[Path], blocks: Iterable[Path]) -> None:
        """Sends the folders that the store has not. Of many hosts, process 0 does it."""


class StoredCache(LocalCache):
    """A cache in a store; every method raises UserError where the store fails, see `Store`."""

    def __init__(self, place: Path, folder: Path):
        """Looks at what the store has.

        Args:
          folder: the local folder of the blocks.
        """
        self._folder = folder
        self._domain_store, self._block_store = Store(place), Store(place / folder.name)
        names, below = self._domain_store.names(), f"{folder.name}/"
        self._domains, _ = folders_among(names)
        self._blocks, _ = folders_among(n.removeprefix(below) for n in names if n.startswith(below))

    def fetch(self, directory: Path, keys: Callable[[], Iterable[str]]) -> None:
        if directory.exists():
            return
        if directory.name in self._domains:
            self._fetch(self._domain_store, self._domains, directory)
        if directory.exists():
            names = json.loads((directory / BLOCKS).read_text(encoding="utf-8"))
            wanted = self._blocks.intersection(names)
        else:
            # A block of a source with max_rows has its limit after its key.
            wanted = {name for key in keys() for name in self._blocks if name.startswith(key)}
        missing = [name for name in sorted(wanted) if not (self._folder / name).exists()]
        if missing:
            log.info(f"fetching {len(missing)} blocks of the cache from {self._block_store.url}")
        for name in missing:
            self._fetch(self._block_store, self._blocks, self._folder / name)

    def send(self, domains: Iterable[Path], blocks: Iterable[Path]) -> None:
        if not hosts.is_main():
            return
        # The blocks first: a domain whose blocks are missing would be made anew.
        for store, stored, directories in (
            (self._block_store, self._blocks, blocks),
            (self._domain_store, self._domains, domains),
        ):
            for directory in directories:
                if directory.name not in stored:
                    send_folder(store, directory.name, directory)
                    stored.add(directory.name)

    def _fetch(self, store: Store, stored: set[str], directory: Path) -> None:
        """Fetches a folder; one that is damaged is told, and counts as missing."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_folder(store, directory.name, directory, _records_sums)
        except DamagedFolder as error:
            log.warning(
                f"the cache in {store.url}/{directory.name} is damaged ({error}) and is made anew"
            )
            stored.discard(directory.name)


def _records_sums(directory: Path) -> dict[str, str]:
    """The checksum of the records of a block, which is in its counts; a domain has none."""
    counts = directory / COUNTS
    return (
        json.loads(counts.read_text(encoding="utf-8")).get("sha256", {}) if counts.exists() else {}
    )


def open_stored(place: Path, folder: Path) -> LocalCache:
    """What connects the cache on this disk with the store that data.cache_dir names, if it does.

    Args:
      place: data.cache_dir.
      folder: the local folder of the blocks.
    """
    return StoredCache(place, folder) if is_url(place) else LocalCache()

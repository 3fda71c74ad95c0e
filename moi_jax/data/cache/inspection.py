"""Inspecting a prepared cache: opened as it lies there, and verified, without changing anything."""

from collections.abc import Mapping
from pathlib import Path

from moi_jax.common.checksums import check_sums
from moi_jax.common.errors import UserError, reason
from moi_jax.data.cache.domain import DomainCache, read_domain
from moi_jax.data.cache.writer import COUNTS, HASHES, LENGTHS, SAMPLES

READ_AT_ONCE = 1_000  # records


def open_unchanged(name: str, key: str, cache_dir: Path, digests: Mapping[str, str]) -> DomainCache:
    """Opens the cache of a domain under its key.

    Args:
      digests: source file -> digest, of the files that the key was made of.

    Raises:
      UserError: it is missing or damaged.
    """
    directory = cache_dir / Path(key).name
    if not directory.is_dir():
        raise UserError(
            f"the cache of domain {name} is not in {cache_dir} (folder {key}); restore it, or "
            f"prepare it again from the unchanged sources"
        )
    try:
        return read_domain(name, directory, cache_dir / "blocks", digests)
    except (OSError, ValueError) as error:
        raise _damaged(name, directory, error) from None


def verify_records(cache: DomainCache) -> int:
    """Verifies all blocks of a domain: the checksums of their files, and of every record.

    Returns:
      The number of records read.

    Raises:
      UserError: a file or a record has changed; the first block is named.
    """
    for block in cache.blocks:
        try:
            names = [LENGTHS, HASHES, SAMPLES, COUNTS]
            check_sums(block, [name for name in names if (block / name).exists()])
        except (OSError, ValueError) as error:
            raise _damaged(cache.name, block, error) from None
    records = len(cache.lengths)
    for first in range(0, records, READ_AT_ONCE):
        last = min(first + READ_AT_ONCE, records)
        found = cache.read(range(first, last))  # each record has a checksum of its own
        for number, instruction in enumerate(found, first):
            if len(instruction.tokens) != (expected := cache.lengths[number, 0]):
                raise UserError(
                    f"record {number} of domain {cache.name} in {cache.directory} has "
                    f"{len(instruction.tokens)} tokens, its lengths.npy says {expected}; delete "
                    f"the folder and prepare the data again"
                )
    return records


def _damaged(name: str, folder: Path, error: Exception) -> UserError:
    what = reason(error) if isinstance(error, OSError) else str(error)
    return UserError(
        f"the cache of domain {name} in {folder} is damaged ({what}); delete the folder and "
        f"prepare the data again from the unchanged sources"
    )

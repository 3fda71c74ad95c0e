"""Checksums of a checkpoint: written as its last file, verified before the others are read."""

import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from moi_jax.checkpoints.damage import DamagedCheckpoint, cannot_read
from moi_jax.common.checksums import SUMS, digests, read_sums, write_sums

# The items with almost all bytes of a checkpoint. All others are small, and always verified.
ARRAYS = ("parameters", "optimizer")

log = logging.getLogger(__name__)


def write_checksums(step: Path) -> None:
    """Writes the checksums of all files of a step; no file of an item may change after it.

    Raises:
      OSError: a file cannot be read or written.
    """
    write_sums(step, sorted(_files(step)))


def verify_small_items(step: Path) -> int:
    """Verifies all files of a step but those of `ARRAYS`; returns how many it verified.

    Raises:
      DamagedCheckpoint: a file is missing, has changed, or was not written with the checkpoint.
    """
    return _verify(step, lambda item: item not in ARRAYS)


def verify_arrays(step: Path, items: Collection[str] = ARRAYS) -> int:
    """Verifies all files of these `ARRAYS`; returns how many it verified.

    Warns where the step has no checksums, because an older version has written it.

    Raises:
      DamagedCheckpoint: a file is missing, has changed, or was not written with the checkpoint.
    """
    verified = _verify(step, lambda item: item in items)
    if not verified:
        log.warning(f"{step} has no checksums, so damage to its parameters would go unnoticed")
    return verified


def _verify(step: Path, chosen: Callable[[str], bool]) -> int:
    try:
        sums = read_sums(step)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise cannot_read(step, error) from None
    except ValueError as error:
        raise DamagedCheckpoint(step, error) from None
    expected = {name: digest for name, digest in sums.items() if chosen(_item(name))}
    for name in expected:
        if not (step / name).is_file():
            raise DamagedCheckpoint(step, f"{name} is missing")
    for name in _files(step):
        # Beside the items lie files for people, such as a licence, which may come and go.
        if "/" in name and name not in sums and chosen(_item(name)):
            raise DamagedCheckpoint(step, f"{name} was not written with the checkpoint")
    try:
        for name, digest in digests(step, expected):
            if digest != expected[name]:
                raise DamagedCheckpoint(step, f"{name} has changed since it was written")
    except OSError as error:
        raise cannot_read(step, error) from None
    return len(expected)


def _files(step: Path) -> Iterator[str]:
    """The names of all files of a step but the checksums, relative to it."""
    for path in step.rglob("*"):
        if path.is_file() and path != step / SUMS and not path.name.startswith(".nfs"):
            yield path.relative_to(step).as_posix()


def _item(name: str) -> str:
    """The item that a file belongs to: the first folder of its name."""
    return name.split("/")[0]

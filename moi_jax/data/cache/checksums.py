"""Checksums of the files in a folder of the cache, in the form of coreutils' SHA256SUMS.

`sha256sum --check SHA256SUMS` verifies a folder by hand. The records are not among the files: each
record has a checksum of its own, which is verified when it is read.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

SUMS = "SHA256SUMS"


def write_sums(directory: Path, names: Sequence[str]) -> None:
    """Writes the checksums of the files `names`."""
    lines = [f"{_sha256(directory / name)}  {name}\n" for name in names]
    (directory / SUMS).write_text("".join(lines), encoding="ascii")


def check_sums(directory: Path, names: Sequence[str]) -> None:
    """Checks the files `names` against their checksums.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a file differs from its checksum, or has none.
    """
    lines = set((directory / SUMS).read_text(encoding="ascii").splitlines())
    for name in names:
        if f"{_sha256(directory / name)}  {name}" not in lines:
            raise ValueError(f"{name} differs from its checksum")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checksums of the files in a folder, in the form of coreutils' SHA256SUMS.

`sha256sum --check SHA256SUMS` verifies a copy of the folder anywhere.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
# Bytes. Below, to start threads takes longer than to hash.
WORTH_THREADS = 2**20


def write_sums(directory: Path, names: Iterable[str]) -> None:
    """Writes the checksums of the files `names`, relative to the directory.

    Raises:
      OSError: a file cannot be read or written.
    """
    lines = [f"{digest}  {name}\n" for name, digest in digests(directory, names)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(directory: Path) -> dict[str, str]:
    """File name -> checksum.

    Raises:
      OSError: there are no checksums, or they cannot be read.
      ValueError: the file is not a list of checksums.
    """
    text = (directory / SUMS).read_bytes().decode()
    matches = [LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    if not all(matches):
        raise ValueError(f"{SUMS} is not a list of checksums")
    return {match[2]: match[1] for match in matches if match}


def check_sums(directory: Path, names: Iterable[str]) -> None:
    """Checks the files `names` against their checksums.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a file differs from its checksum, or has none.
    """
    expected = read_sums(directory)
    for name, digest in digests(directory, names):
        if expected.get(name) != digest:
            raise ValueError(f"{name} has changed since it was written")


def digests(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """File name and sha256, in the order of the names; threads hash large files side by side."""
    names = list(names)

    def digest(name: str) -> tuple[str, str]:
        with (directory / name).open("rb") as file:
            return name, hashlib.file_digest(file, "sha256").hexdigest()

    size = sum((directory / name).stat().st_size for name in names)
    with ThreadPoolExecutor() as threads:
        yield from (map if size < WORTH_THREADS else threads.map)(digest, names)

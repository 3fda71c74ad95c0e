"""Blocks: the units of preparation, each kept on disk under a key of its content.

A block is a range of bytes of a file that can be split, or a whole file. Its folder is written
under a temporary name and renamed when it is complete. So an interrupted prepare continues where
it stopped, and two prepares at once do not disturb each other. Domains and configs share blocks
that have the same key.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moi_jax import config
from moi_jax.common.checksums import check_sums
from moi_jax.common.errors import UserError, is_full, reason
from moi_jax.data.cache.leftovers import part_of
from moi_jax.data.cache.writer import COUNTS, HASHES, LENGTHS, RECORDS, SAMPLES, BlockWriter
from moi_jax.data.sources.formats import Typing
from moi_jax.data.sources.readers import SourceFile
from moi_jax.data.sources.rows import SourceRow, source_rows, splittable
from moi_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moi_jax.data.decontamination import Benchmarks

log = logging.getLogger(__name__)

# The size of a block. Files of fewer than sixteen such blocks get smaller ones, but not below
# LEAST_BYTES, so that the last blocks keep all cores busy.
BLOCK_BYTES = 2**23
LEAST_BYTES = 2**21


@dataclass(frozen=True)
class Block:
    """The rows of `file` that begin in the bytes [start, end).

    Attributes:
      format: the format of the rows; None if no row of the file can be read.
      key: sha256 hex of everything that decides the content, except the limit of rows.
    """

    file: SourceFile
    format: str | None
    start: int
    end: int
    key: str

    def rows(self, typing: Typing) -> Iterator[SourceRow]:
        return source_rows(self.file, self.format, self.start, self.end, typing)

    def lines(self) -> int:
        """The number of lines that begin in the block, including blank ones."""
        return lines_beginning(self.file.path, self.start, self.end) if self.file.splittable else 0

    def place(self, line: int) -> str:
        """The place of a line of the block in the file, as `path:line`."""
        before = lines_beginning(self.file.path, 0, self.start) if self.start else 0
        return f"{self.file.path}:{before + line}"


@contextmanager
def domain_errors(domain: str, cache_dir: Path) -> Iterator[None]:
    """Turns an error of the sources or the cache into a UserError that names domain and file."""
    try:
        yield
    except OSError as error:
        file = Path(error.filename or cache_dir)
        what, way_out = reason(error, cache_dir), ""
        if is_full(error):
            file, way_out = cache_dir, "; free some space, or choose another data.cache_dir"
        elif file == cache_dir or cache_dir in file.parents or file in cache_dir.parents:
            way_out = "; choose another data.cache_dir, or get write access to this one"
        raise UserError(f"domain {domain}: cannot read or write {file}: {what}{way_out}") from None


def full_blocks(size: int) -> int:
    """The number of full blocks that `size` bytes make, rounded up."""
    return -(-size // BLOCK_BYTES)


def ranges(file: SourceFile, form: str | None) -> list[tuple[int, int]]:
    """The byte range [start, end) of each block of a file in the format `form`."""
    size = file.size
    width = min(BLOCK_BYTES, max(LEAST_BYTES, size // 16))
    if size <= width or not splittable(file, form):
        return [(0, size)]
    return [(start, min(start + width, size)) for start in range(0, size, width)]


def lines_beginning(path: Path, start: int, end: int) -> int:
    """The number of lines whose first byte lies in [start, end)."""
    count = int(start == 0 < end)
    # A line begins after each newline.
    position, last = max(start - 1, 0), end - 1
    with open(path, "rb") as file:
        file.seek(position)
        while position < last and (content := file.read(min(2**20, last - position))):
            count += content.count(b"\n")
            position += len(content)
    return count


@dataclass(frozen=True)
class WorkItem:
    """Blocks that one process builds in order: one, or all those of a source with max_rows.

    Attributes:
      domain, prompt: the domain of the rows, and its system prompt.
      max_rows: how many rows the blocks keep together; the rows after these are not read.
    """

    domain: str
    prompt: str | None
    blocks: tuple[Block, ...]
    max_rows: int | None

    @property
    def size(self) -> int:
        """Bytes of the source files."""
        return sum(block.end - block.start for block in self.blocks)


@dataclass(frozen=True)
class FinishedBlock:
    """A block on disk: its folder, and the counts that were written with it."""

    directory: Path
    counts: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> FinishedBlock | None:
        """Opens a block; None if the folder is missing, incomplete or damaged.

        The content of the arrays and records is not looked at: see `has_whole_arrays`, and
        `DomainCache.read`.
        """
        try:
            check_sums(directory, [COUNTS])
            counts = json.loads((directory / COUNTS).read_text(encoding="utf-8"))
            sizes = {name: (directory / name).stat().st_size for name in counts["bytes"]}
        except (OSError, ValueError):
            return None
        return cls(directory, counts) if sizes == counts["bytes"] else None

    def has_whole_arrays(self) -> bool:
        """Whether the arrays equal their checksums."""
        names = [name for name in (LENGTHS, HASHES, SAMPLES) if name in self.counts["bytes"]]
        try:
            check_sums(self.directory, names)
        except (OSError, ValueError):
            return False
        return True

    @property
    def records(self) -> Path:
        return self.directory / RECORDS

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lengths, hashes and sample numbers of the block, see `DomainCache`."""
        lengths, hashes = np.load(self.directory / LENGTHS), np.load(self.directory / HASHES)
        if SAMPLES in self.counts["bytes"]:
            return lengths, hashes, np.load(self.directory / SAMPLES)
        return lengths, hashes, np.zeros(len(lengths), np.int32)


@dataclass(frozen=True)
class BlockBuilder:
    """Builds blocks, in this process or, after pickling, in another.

    Attributes:
      folder: holds a folder for each block.
      run: an id in the temporary names of the folders that this run builds, see `leftovers`.
    """

    folder: Path
    data: config.Data
    tokenizer: Tokenizer
    benchmarks: Benchmarks | None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def build(self, item: WorkItem) -> None:
        """Writes the blocks of the item that are missing.

        Raises:
          UserError: a row or a file is refused, or cannot be read or written.
        """
        with domain_errors(item.domain, self.folder.parent):
            for block, max_rows, directory in self._walk(item):
                if _open_whole(directory) is None:
                    self._write(item, block, max_rows, directory)

    def finished(self, item: WorkItem) -> list[FinishedBlock] | None:
        """The blocks of the item, up to its max_rows; None if one of them is missing or damaged."""
        found = []
        for _, _, directory in self._walk(item):
            if (block := _open_whole(directory)) is None:
                if directory.exists():
                    log.warning(f"the cache in {directory} is damaged and is made anew")
                return None
            found.append(block)
        return found

    def _walk(self, item: WorkItem) -> Iterator[tuple[Block, int | None, Path]]:
        """Each block, how many rows it may keep (None: all), and its folder.

        The folder must exist before the next block is asked for.
        """
        left = item.max_rows
        for block in item.blocks:
            if left == 0:
                return
            directory = self.folder / (block.key if left is None else f"{block.key}-{left}")
            yield block, left, directory
            if left is not None:
                done = FinishedBlock.open(directory)
                left -= done.counts["kept"] if done else 0

    def _write(self, item: WorkItem, block: Block, max_rows: int | None, directory: Path) -> None:
        part = part_of(directory, self.run)
        part.mkdir(parents=True)
        writer = BlockWriter(
            part, self.data, item.prompt, self.tokenizer, self.benchmarks, block.place
        )
        try:
            typing = Typing.of(self.data, self.tokenizer.template)
            writer.add(block.rows(typing), max_rows)
            writer.close(block.lines())
        except RuntimeError as error:  # from ArrayRecord, for example when the disk is full
            raise OSError(str(error)) from None
        if directory.exists() and _open_whole(directory) is None:
            shutil.rmtree(directory)
        move_into_place(part, directory)

    def save(self) -> Path:
        """Pickles the builder to a file for other processes, which ends with the run."""
        part = part_of(self.folder / "builder", self.run)
        part.mkdir(parents=True)
        path = part / "builder.pickle"
        path.write_bytes(pickle.dumps(self))
        return path


def _open_whole(directory: Path) -> FinishedBlock | None:
    """Opens a block and looks at its arrays, too; None if it cannot be used."""
    block = FinishedBlock.open(directory)
    return block if block and block.has_whole_arrays() else None


def move_into_place(part: Path, directory: Path) -> None:
    """Renames a complete folder to its final name."""
    try:
        part.rename(directory)
    except OSError:
        # If the folder exists, another process was first and wrote the same content.
        if not directory.exists():
            raise
        shutil.rmtree(part)

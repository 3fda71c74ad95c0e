"""The cache of a domain: lengths and hashes of its instructions, and where their tokens are."""

import functools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from moi_jax.common.checksums import check_sums, write_sums
from moi_jax.common.errors import UserError
from moi_jax.data.cache.blocks import Block, FinishedBlock, move_into_place
from moi_jax.data.cache.leftovers import part_of
from moi_jax.data.cache.records import from_record
from moi_jax.data.cache.writer import (
    EXAMPLES,
    HASHES,
    LENGTHS,
    NOTES,
    RECORDS,
    RENDERING_NOTES,
    SAMPLES,
    records_kept,
)
from moi_jax.text.instructions import TARGETS, Instruction

log = logging.getLogger(__name__)

MANIFEST, BLOCKS = "manifest.json", "blocks.json"
FILES = (LENGTHS, HASHES, MANIFEST, BLOCKS)


@dataclass(frozen=True)
class DomainCache:
    """The n instructions of a domain on disk.

    Attributes:
      name: the domain.
      directory: holds lengths.npy, hashes.npy, manifest.json, blocks.json, SHA256SUMS, and
        samples.npy if some conversation has several samples.
      key: sha256 hex of everything that decides the content.
      lengths: int32[n, 3]: tokens, loss tokens under `assistant`, loss tokens under
        `qwen_official`.
      hashes: uint64[n, 2]: `content_hash` of all messages of the conversation as it is kept, plus
        the number of the sample; and of its turns alone.
      manifest: rows read, rows kept, rows dropped by reason, and a table of the files.
      source_starts: int64[sources + 1]; the instructions of source i are [source_starts[i],
        source_starts[i + 1]).
      blocks: the folders with the records.
      block_starts: int64[blocks + 1]; the instructions of block i are [block_starts[i],
        block_starts[i + 1]).
      digests: source file -> sha256 hex of its content, in the order of the sources.
      samples: int32[n], the number of each instruction among the samples of its conversation, which
        stand beside each other; None if every conversation is one instruction.
    """

    name: str
    directory: Path
    key: str
    lengths: np.ndarray
    hashes: np.ndarray
    manifest: dict[str, Any]
    source_starts: np.ndarray
    blocks: tuple[Path, ...]
    block_starts: np.ndarray
    digests: Mapping[str, str] = field(default_factory=dict)
    samples: np.ndarray | None = None

    @functools.cached_property
    def conversation_of(self) -> np.ndarray:
        """int64[n]: the number of the conversation of each instruction."""
        if self.samples is None:
            return np.arange(len(self.lengths))
        return np.cumsum(self.samples == 0) - 1

    def conversations(self, indices: np.ndarray) -> int:
        """The number of conversations of the instructions at `indices`, which are ascending."""
        return int(np.count_nonzero(np.diff(self.conversation_of[indices], prepend=-1)))

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Instruction]:
        """The instructions at `indices`; each block is read once.

        Safe in threads and in spawned processes. A forked process may hang, because the locks of
        ArrayRecord's reader do not survive a fork.
        """
        wanted = np.asarray(indices, np.int64)
        block_of = np.searchsorted(self.block_starts, wanted, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        found: dict[int, Instruction] = {}
        for places in np.split(order, np.flatnonzero(np.diff(block_of[order])) + 1):
            if not len(places):
                continue
            block = int(block_of[places[0]])
            inside = (wanted[places] - self.block_starts[block]).tolist()
            instructions = self._read_block(self.blocks[block], inside)
            found.update(zip(places.tolist(), instructions, strict=True))
        return [found[place] for place in range(len(wanted))]

    def _read_block(self, block: Path, inside: list[int]) -> list[Instruction]:
        try:
            return [from_record(record) for record in _reader(block / RECORDS).read(inside)]
        except RuntimeError as error:  # from ArrayRecord
            raise UserError(
                f"the cache of domain {self.name} is damaged ({error}); delete {block} "
                f"and run again"
            ) from None


@functools.lru_cache(maxsize=256)
def _reader(path: Path) -> array_record_module.ArrayRecordReader:
    # Not an attribute of DomainCache, which must be picklable. The options are for random access.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return array_record_module.ArrayRecordReader(str(path), options)


def loss_column(targets: str) -> int:
    """The column of `DomainCache.lengths` with the loss tokens under loss.targets."""
    return 1 + list(TARGETS).index(targets)


class DamagedBlock(ValueError):
    """A block of a domain is missing or damaged."""


def open_domain(
    name: str, directory: Path, folder: Path, digests: Mapping[str, str]
) -> DomainCache | None:
    """Opens a domain's cache; None if it is missing or damaged. A damaged one is told and removed.

    Args:
      folder: the folder of the blocks.
      digests: the present name of each source file, with its digest.
    """
    if not directory.exists():
        return None
    try:
        return read_domain(name, directory, folder, digests)
    except DamagedBlock:
        pass  # told where the block is made anew
    except (OSError, ValueError) as error:
        # After a full disk, a broken copy or a fault of the disk. It can always be built again.
        log.warning(f"the cache of domain {name} is damaged and is made anew: {error}")
    shutil.rmtree(directory)
    return None


def read_domain(
    name: str, directory: Path, folder: Path, digests: Mapping[str, str]
) -> DomainCache:
    """Reads a domain's cache and changes nothing; see `open_domain`.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a file differs from its checksum; DamagedBlock: a block cannot be used.
    """
    check_sums(directory, FILES)
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    names = json.loads((directory / BLOCKS).read_text(encoding="utf-8"))
    lengths, hashes, samples = np.load(directory / LENGTHS), np.load(directory / HASHES), None
    if "samples" in manifest:
        check_sums(directory, [SAMPLES])
        samples = np.load(directory / SAMPLES)
    kept = []
    for block in names:
        if (finished := FinishedBlock.open(folder / block)) is None:
            raise DamagedBlock(f"its block {folder / block} is missing or damaged")
        kept.append(records_kept(finished.counts))
    if sum(kept) != len(lengths):
        raise DamagedBlock(f"its blocks hold {sum(kept)} instructions, not {len(lengths)}")
    _rename(manifest, list(digests))
    source_starts = np.cumsum([0, *manifest["sources"]], dtype=np.int64)
    # A folder that was built again must not be read through a reader of the old one.
    _reader.cache_clear()
    return DomainCache(
        name,
        directory,
        directory.name,
        lengths,
        hashes,
        manifest,
        source_starts,
        tuple(folder / block for block in names),
        np.cumsum([0, *kept], dtype=np.int64),
        digests,
        samples,
    )


def _rename(manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Gives the files their present names: files may have been renamed since they were prepared."""
    current = {file["name"]: name for file, name in zip(manifest["files"], names, strict=True)}
    for file in manifest["files"]:
        file["name"] = current[file["name"]]
    for row in manifest["examples"]:
        row["file"] = current[row["file"]]
    manifest["empty_files"] = [current[name] for name in manifest["empty_files"]]


Found = tuple[Block, FinishedBlock | None]  # None for a block that is not read because of max_rows


def write_domain(directory: Path, sources: Sequence[Sequence[Found]], run: str) -> None:
    """Writes a domain's folder from the blocks of its sources; it is renamed when complete.

    Args:
      run: the id of the run that builds it, see `leftovers`.

    Raises:
      OSError: the folder cannot be written.
    """
    blocks = [block for _, block in chain(*sources) if block]
    arrays = [(np.zeros((0, 3), np.int32), np.zeros((0, 2), np.uint64), np.zeros(0, np.int32))]
    arrays += [block.arrays() for block in blocks]
    manifest = _manifest(sources)
    files = (*FILES, SAMPLES) if "samples" in manifest else FILES
    part = part_of(directory, run)
    part.mkdir(parents=True)
    try:
        names = (LENGTHS, HASHES, SAMPLES)
        for name, content in zip(names, zip(*arrays, strict=True), strict=True):
            if name in files:
                np.save(part / name, np.concatenate(content))
        folders = [block.directory.name for block in blocks]
        for name, values in ((MANIFEST, manifest), (BLOCKS, folders)):
            (part / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        write_sums(part, files)
        move_into_place(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _manifest(sources: Sequence[Sequence[Found]]) -> dict[str, Any]:
    """The sums of the blocks' counts; examples of dropped rows and of ignored keys in each file."""
    files: dict[str, dict[str, Any]] = {}
    sums: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    examples, reached = [], set()
    for block, finished in chain(*sources):
        name = block.file.name
        file = files.setdefault(name, {"name": name, "format": block.format, "read": 0, "kept": 0})
        if finished is None:
            continue
        counts = finished.counts
        reached.add(name)
        file["read"] += counts["read"]
        file["kept"] += counts["kept"]
        sums.update({key: counts[key] for key in ("read", "kept", *NOTES)})
        sums.update({key: counts[key] for key in RENDERING_NOTES if key in counts})
        sums["records"] += records_kept(counts)
        dropped.update(counts["dropped"])
        for key, found in counts["ignored"].items():
            first = {**found, "rows": 0, "line": lines[name] + found["line"]}
            file.setdefault("ignored", {}).setdefault(key, first)["rows"] += found["rows"]
        for row in counts["examples"]:
            seen[row["reason"]] += 1
            if seen[row["reason"]] <= EXAMPLES:
                examples.append({**row, "file": name, "line": lines[name] + row["line"]})
        lines[name] += counts["lines"]
    return {
        **{key: sums[key] for key in ("read", "kept")},
        "dropped": dict(sorted(dropped.items())),
        **{key: sums[key] for key in NOTES},
        **{key: sums[key] for key in RENDERING_NOTES if key in sums},
        # Only where a conversation has several samples.
        **({"samples": sums["records"]} if sums["records"] > sums["kept"] else {}),
        "empty_files": [name for name, f in files.items() if name in reached and not f["read"]],
        "files": list(files.values()),
        "sources": [sum(records_kept(f.counts) for _, f in found if f) for found in sources],
        "examples": examples,
    }

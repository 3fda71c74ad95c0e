"""The tokenised cache: each domain rendered once, kept under a key of all that decides it."""

import functools
import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from rich.console import Console
from rich.progress import Progress

from moi_jax import config
from moi_jax.console import say
from moi_jax.data import chatml, sources
from moi_jax.data.cache_writer import (
    BY_CONFIG,
    DomainWriter,
    bad_row_error,
    empty_file_error,
    from_record,
)
from moi_jax.data.chatml import Instruction
from moi_jax.data.readers import SourceFile
from moi_jax.data.tokenizer import Tokenizer
from moi_jax.errors import UserError

CACHE_FORMAT = 3
PART = ".part"  # ends the name of a folder that is being built
ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class DomainCache:
    """A domain's instructions on disk, what is known of each, and how they came about.

    Attributes:
      name: the domain.
      directory: holds instructions.array_record, lengths.npy, hashes.npy, manifest.json.
      key: sha256 hex of all that decides the content.
      lengths: int32[n, 3], tokens and loss tokens under `assistant` and `qwen_official`.
      hashes: uint64[n, 2], `content_hash` of each conversation as kept: of all its messages, and
        of its turns without a system text of its own.
      manifest: rows read, kept and dropped by reason, and a table of the files.
    """

    name: str
    directory: Path
    key: str
    lengths: np.ndarray
    hashes: np.ndarray
    manifest: dict[str, Any]

    @property
    def source_starts(self) -> np.ndarray:
        return np.array([0, len(self.lengths)])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Instruction]:
        """The instructions at `indices`, in one read; for any thread, and spawned processes.

        A forked process may hang: the locks of ArrayRecord's reader do not survive a fork.
        """
        reader = _reader(self.directory / "instructions.array_record")
        try:
            return [from_record(record) for record in reader.read([int(i) for i in indices])]
        except RuntimeError as error:  # what ArrayRecord raises
            raise UserError(
                f"the cache of domain {self.name} is damaged ({error}); delete {self.directory} "
                f"and it is made anew"
            ) from None


def loss_column(targets: str) -> int:
    """The column of `lengths` with the loss tokens under loss.targets."""
    return 1 + list(chatml.TARGETS).index(targets)


@functools.lru_cache(maxsize=64)
def _reader(path: Path) -> array_record_module.ArrayRecordReader:
    # Kept open out of the DomainCache, which so can be pickled. The options are for random access.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return array_record_module.ArrayRecordReader(str(path), options)


def resolve_prompt(data: config.Data, domain: config.Domain) -> str | None:
    """The system prompt of a domain under data.system_prompts; None for no system block."""
    if data.system_prompts == "none":
        return None
    if data.system_prompts == "default" or domain.prompt is None:
        return data.default_system_prompt
    return domain.prompt


def prepare(data: config.Data, tokenizer: Tokenizer, console: Console) -> list[DomainCache]:
    """Brings every domain into the cache, in config order; what is there already is not redone.

    Args:
      data: the config section; a domain's cache depends on it, the tokenizer and the files alone.
      tokenizer: gives the ids.
      console: shows progress; where it is no terminal, one line a domain.

    Raises:
      UserError: a source matches nothing, a file stands twice, a row or a domain is unusable.
    """
    if not data.domains:
        raise UserError("data.domains is empty; name at least one domain with its sources")
    expanded = [sources.expand(data.root, domain.sources) for domain in data.domains]
    _refuse_files_standing_twice(data, expanded)
    caches = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for domain, files in zip(data.domains, expanded, strict=True):
            task = progress.add_task(domain.name, total=None)
            try:
                size = sum(file.size for file in chain(*files))
                progress.update(task, total=size)
                advance = functools.partial(progress.advance, task)
                cache, built = _prepare_domain(data, domain, files, tokenizer, advance)
            except OSError as error:
                raise UserError(
                    f"domain {domain.name}: cannot read or write {error.filename}: {error.strerror}"
                ) from None
            except RuntimeError as error:  # what ArrayRecord raises, say when a disk is full
                raise UserError(
                    f"domain {domain.name}: cannot write below {data.cache_dir}: {error}"
                ) from None
            progress.update(task, completed=size)
            if not console.is_terminal:
                line = f"{domain.name}: {'prepared' if built else 'cached'}, {_summary(cache)}"
                say(console, line)
            caches.append(cache)
    return caches


def _refuse_files_standing_twice(data: config.Data, expanded: list[list[list[SourceFile]]]) -> None:
    seen: dict[Path, str] = {}
    for domain, files in zip(data.domains, expanded, strict=True):
        for file in chain(*files):
            path = file.path.resolve()
            if path in seen:
                raise UserError(
                    f"{file.name} stands twice, in domain {seen[path]} and in domain "
                    f"{domain.name}; leave it in one source"
                )
            seen[path] = domain.name


def _prepare_domain(
    data: config.Data,
    domain: config.Domain,
    files: list[list[SourceFile]],
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> tuple[DomainCache, bool]:
    """The domain's cache, and whether it was built just now."""
    key = _key(data, domain, files, tokenizer)
    directory = data.cache_dir.expanduser() / key
    if built := not directory.exists():
        _build_whole(directory, data, domain, files, tokenizer, advance)
    try:
        cache = _open(domain.name, directory, key, files)
    except (EOFError, KeyError, OSError, ValueError, json.JSONDecodeError):
        # Cut short by a full disk or a copy: what is in the cache can always be made again.
        shutil.rmtree(directory)
        _build_whole(directory, data, domain, files, tokenizer, advance)
        cache, built = _open(domain.name, directory, key, files), True
    if data.on_bad_row == "error":
        _refuse_bad_rows(data, cache.manifest)
    return cache, built


def _build_whole(
    directory: Path,
    data: config.Data,
    domain: config.Domain,
    files: list[list[SourceFile]],
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> None:
    """Builds a domain's folder beside its place and moves it there when it is whole."""
    part = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}{PART}")
    part.mkdir(parents=True)
    _sweep(directory.parent)
    try:
        _build(part, data, domain, files, tokenizer, advance)
        _move_into_place(part, directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(cache_dir: Path) -> None:
    """Removes what processes left half built that were killed more than a day ago."""
    for part in cache_dir.glob(f"*{PART}"):
        if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(part, ignore_errors=True)


def _open(name: str, directory: Path, key: str, files: list[list[SourceFile]]) -> DomainCache:
    """Opens a domain's folder; raises what its files raise when one is damaged."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    lengths, hashes = np.load(directory / "lengths.npy"), np.load(directory / "hashes.npy")
    # A folder made anew must not be read by a reader of the old one.
    _reader.cache_clear()
    records = _reader(directory / "instructions.array_record").num_records()
    if not len(lengths) == len(hashes) == records == manifest["kept"]:
        raise ValueError("the files of the cache differ in length")
    _rename(manifest, [file.name for file in chain(*files)])
    return DomainCache(name, directory, key, lengths, hashes, manifest)


def _rename(manifest: dict[str, Any], names: list[str]) -> None:
    """Gives the files the names they have now: the same bytes may have moved since."""
    current = {file["name"]: name for file, name in zip(manifest["files"], names, strict=True)}
    for file in manifest["files"]:
        file["name"] = current[file["name"]]
    for row in manifest["examples"]:
        row["file"] = current[row["file"]]
    manifest["empty_files"] = [current[name] for name in manifest["empty_files"]]


def _key(
    data: config.Data, domain: config.Domain, files: list[list[SourceFile]], tokenizer: Tokenizer
) -> str:
    content = {
        "cache_format": CACHE_FORMAT,
        "renderer": tokenizer.template.version,
        "template": tokenizer.template.name,
        "tokenizer": tokenizer.fingerprint,
        "prompt": resolve_prompt(data, domain),
        "row_system": data.row_system,
        "too_long": data.too_long,
        "limit": data.max_instruction_tokens or data.sequence_length,
        "sources": [
            [source.format, source.max_rows, [file.digest() for file in part]]
            for source, part in zip(domain.sources, files, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _build(
    directory: Path,
    data: config.Data,
    domain: config.Domain,
    files: list[list[SourceFile]],
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> None:
    writer = DomainWriter(directory, data, resolve_prompt(data, domain), tokenizer)
    for source, part in zip(domain.sources, files, strict=True):
        room = source.max_rows
        for file in part:
            kept = writer.add_file(file, source, room, advance)
            room = None if room is None else room - kept
    manifest = writer.close()
    if not manifest["kept"]:
        names = ", ".join(file.name for file in chain(*files))
        raise UserError(
            f"domain {domain.name} has no usable row in {names}: "
            f"{manifest['read']:,} read, dropped {_counts(manifest['dropped'])}"
        )


def _move_into_place(part: Path, directory: Path) -> None:
    try:
        part.rename(directory)
    except OSError:
        # Another process was first, with the same content; else the failure is a true one.
        if not directory.exists():
            raise


def _refuse_bad_rows(data: config.Data, manifest: dict[str, Any]) -> None:
    """data.on_bad_row: error, for a cache that was built under `drop`."""
    for row in manifest["examples"]:
        if row["reason"] not in BY_CONFIG:
            raise bad_row_error(data.root / row["file"], row["line"], row["reason"], row["detail"])
    for name in manifest["empty_files"]:
        raise empty_file_error(data.root / name)


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "none"


def _summary(cache: DomainCache) -> str:
    manifest = cache.manifest
    tokens, loss_tokens, _ = cache.lengths.sum(axis=0, dtype=np.int64).tolist()
    return (
        f"{manifest['kept']:,} of {manifest['read']:,} rows kept, {tokens:,} tokens, "
        f"{loss_tokens:,} with loss; dropped: {_counts(manifest['dropped'])}"
    )


@dataclass(frozen=True)
class Selection:
    """What of a domain's cache is trained on and what is held out: ascending indices, int64."""

    train: np.ndarray
    held_out: np.ndarray
    duplicates: int
    no_loss_tokens: int


def select(
    caches: Sequence[DomainCache], held_out: config.HeldOut, targets: str
) -> list[Selection]:
    """Leaves out instructions without labels and duplicates, and holds some out by content.

    The first of equal conversations over all domains stays. Which are held out is decided by
    the hash of their turns alone, never by position or seed; conversations with the same turns
    are all held out, in any domain and under any system text, or none is.

    Args:
      caches: in config order.
      held_out: how many are held out: max(fraction, min rows), at most 10 % of the domain.
      targets: loss.targets.

    Raises:
      UserError: nothing is left of a domain.
    """
    column = loss_column(targets)
    candidates = [np.flatnonzero(cache.lengths[:, column]) for cache in caches]
    hashes = [cache.hashes[rows, 0] for cache, rows in zip(caches, candidates, strict=True)]
    first = np.zeros(sum(map(len, hashes)), bool)
    first[np.unique(np.concatenate(hashes), return_index=True)[1]] = True
    offsets = np.cumsum([len(rows) for rows in candidates])[:-1]
    kept_rows = []
    for cache, rows, unique in zip(caches, candidates, np.split(first, offsets), strict=True):
        kept_rows.append(rows[unique])
        if not unique.any():
            raise UserError(
                f"domain {cache.name} has nothing to train on: {len(cache.hashes) - len(rows)} "
                f"rows without loss tokens, {len(rows)} equal to rows of earlier domains"
            )
    turns = [cache.hashes[kept, 1] for cache, kept in zip(caches, kept_rows, strict=True)]
    held_turns = np.concatenate([_held_out_turns(domain, held_out) for domain in turns])
    selections = []
    for cache, rows, kept, domain in zip(caches, candidates, kept_rows, turns, strict=True):
        held = np.isin(domain, held_turns)
        selections.append(
            Selection(
                train=kept[~held],
                held_out=kept[held],
                duplicates=len(rows) - len(kept),
                no_loss_tokens=len(cache.hashes) - len(rows),
            )
        )
    return selections


def _held_out_turns(turns: np.ndarray, held_out: config.HeldOut) -> np.ndarray:
    """The hashes of the turns that a domain holds out, the smallest when mixed."""
    order = np.argsort(_mix(turns))
    count = _held_out_count(len(turns), held_out)
    # Equal turns stay together, on the training side when they would be too many.
    while 0 < count < len(turns) and turns[order[count]] == turns[order[count - 1]]:
        count -= 1
    return turns[order[:count]]


def _held_out_count(rows: int, held_out: config.HeldOut) -> int:
    # Rounded first: 0.07 * 100 is 7.000000000000001.
    share = math.ceil(round(held_out.fraction * rows, 6))
    return min(max(share, held_out.min), rows // 10)


def _mix(hashes: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014), so that held-out rows are no prefix of the hash order."""
    mixed = hashes + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def domain_report(
    caches: Sequence[DomainCache], selections: Sequence[Selection]
) -> dict[str, dict[str, Any]]:
    """Per domain where its rows went: read = sum of dropped + held_out + train."""
    return {
        cache.name: {
            "read": cache.manifest["read"],
            "dropped": {
                **cache.manifest["dropped"],
                "duplicate": selection.duplicates,
                "no_loss_tokens": selection.no_loss_tokens,
            },
            "held_out": len(selection.held_out),
            "train": len(selection.train),
            "own_system": cache.manifest["own_system"],
            "trimmed_user_turn": cache.manifest["trimmed_user_turn"],
            "truncated_turns": cache.manifest["truncated_turns"],
            "empty_files": cache.manifest["empty_files"],
        }
        for cache, selection in zip(caches, selections, strict=True)
    }

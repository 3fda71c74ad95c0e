"""Preparing the tokenised cache: each domain is rendered once and kept under a key of its content.

<cache_dir>/<key of the domain>/  lengths.npy, hashes.npy, manifest.json, blocks.json, SHA256SUMS
<cache_dir>/blocks/<key>/         the tokens of a block of the sources
"""

import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.common.progress import progress_bars
from moi_jax.data.cache.blocks import (
    Block,
    BlockBuilder,
    FinishedBlock,
    WorkItem,
    domain_errors,
    full_blocks,
    ranges,
)
from moi_jax.data.cache.digests import Digests
from moi_jax.data.cache.domain import DomainCache, open_domain, write_domain
from moi_jax.data.cache.leftovers import running
from moi_jax.data.cache.notices import counts_text, log_notices, no_usable_row
from moi_jax.data.cache.stored import open_stored
from moi_jax.data.cache.workers import run_work
from moi_jax.data.cache.writer import BY_CONFIG, bad_row_error, changes
from moi_jax.data.decontamination import Benchmarks
from moi_jax.data.sources.formats import Typing
from moi_jax.data.sources.readers import SourceFile
from moi_jax.data.sources.rows import detect_format, expand
from moi_jax.text.prompts import resolve_prompt
from moi_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CACHE_FORMAT = 6


def prepare(data: config.Data, tokenizer: Tokenizer) -> list[DomainCache]:
    """Prepares the domains that are not in the cache, and opens all of them in config order.

    Args:
      data: the config section; a domain's cache depends only on it, the tokenizer and the files.

    Raises:
      UserError: a source matches no file, a file is listed twice, or a row or domain is unusable.
    """
    jobs, builder = _remembering_jobs(data, tokenizer)
    if builder.benchmarks:
        _log_benchmarks(builder.benchmarks)
    stored = open_stored(data.cache_dir, builder.folder)
    for job in jobs:
        with domain_errors(job.domain.name, builder.folder.parent):
            stored.fetch(job.directory, job.block_keys)
    opened = [job.open(builder) for job in jobs]
    caches = _with_missing(jobs, opened, builder)
    for cache in caches:
        stored.send([cache.directory], cache.blocks)
    for job, known, cache in zip(jobs, opened, caches, strict=True):
        how = "cached" if known else "prepared"
        if data.on_bad_row == "error":
            _refuse_bad_rows(job, cache.manifest)
        if not len(cache.lengths):
            raise no_usable_row(job.domain, job.files, cache.manifest)
        log.info(f"{cache.name}: {how}, {_summary(cache)}")
        log_notices(cache.name, cache.manifest)
    return caches


def prepare_shard(data: config.Data, tokenizer: Tokenizer, shard: int, shards: int) -> None:
    """Prepares a share of the blocks, as job `shard` (1 to `shards`) of a job array.

    When all jobs are done, `prepare` assembles the domains.

    Raises:
      UserError: see `prepare`.
    """
    jobs, builder = _remembering_jobs(data, tokenizer)
    items = [item for job in jobs for item in chain(*job.items)]
    mine = items[shard - 1 :: shards]
    stored = open_stored(data.cache_dir, builder.folder)
    with _running(jobs, builder):
        for job in jobs:
            stored.fetch(job.directory, lambda: {b.key for item in mine for b in item.blocks})
        _build(mine, builder)
        stored.send([], [b.directory for item in mine for b in builder.finished(item) or ()])
    log.info(f"shard {shard} of {shards}: {len(mine)} of {len(items)} blocks are prepared")


def are_prepared(data: config.Data, tokenizer: Tokenizer) -> bool:
    """Whether all domains are in the cache, so that `prepare` has nothing to do.

    Raises:
      UserError: a source is missing or cannot be read.
    """
    jobs, builder = _remembering_jobs(data, tokenizer)
    return all(job.open(builder) is not None for job in jobs)


def domain_sources(data: config.Data, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """What the sources hold now: the key of each domain, and the digest of each of its files.

    Every file is hashed anew, whatever the cache remembers of it.

    Returns:
      As `Dataset.sources`.

    Raises:
      UserError: a source is missing or cannot be read.
    """
    jobs, _ = _jobs(data, tokenizer, SourceFile.digest)
    return {
        job.domain.name: {"key": job.directory.name, "files": job.digest_of_file} for job in jobs
    }


@dataclass(frozen=True)
class _Job:
    """The preparation of a domain.

    Attributes:
      files, digests: by source.
      recipe: everything that decides the content, except the files.
      directory: where the domain's cache is written.
    """

    domain: config.Domain
    prompt: str | None
    files: list[list[SourceFile]]
    digests: list[list[str]]
    recipe: dict[str, Any]
    directory: Path

    def open(self, builder: BlockBuilder) -> DomainCache | None:
        with domain_errors(self.domain.name, self.directory.parent):
            return open_domain(
                self.domain.name, self.directory, builder.folder, self.digest_of_file
            )

    @property
    def digest_of_file(self) -> dict[str, str]:
        names = [file.name for file in chain(*self.files)]
        return dict(zip(names, chain(*self.digests), strict=True))

    @functools.cached_property
    def items(self) -> list[list[WorkItem]]:
        """The work items of each source."""
        by_source = []
        with domain_errors(self.domain.name, self.directory.parent):
            for source, *pairs in zip(self.domain.sources, self.files, self.digests, strict=True):
                blocks = tuple(
                    block
                    for file, digest in zip(*pairs, strict=True)
                    for block in self._blocks(file, digest, source.format)
                )
                max_rows = source.max_rows
                split = [(block,) for block in blocks] if max_rows is None else [blocks]
                by_source.append(
                    [WorkItem(self.domain.name, self.prompt, part, max_rows) for part in split]
                )
        return by_source

    def block_keys(self) -> list[str]:
        return [block.key for item in chain(*self.items) for block in item.blocks]

    def _blocks(self, file: SourceFile, digest: str, form: str | None) -> list[Block]:
        if form == "auto":
            form = detect_format(file)
        return [
            Block(file, form, *part, _hash([self.recipe, form, digest, *part]))
            for part in ranges(file, form)
        ]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remembering_jobs(data: config.Data, tokenizer: Tokenizer) -> tuple[list[_Job], BlockBuilder]:
    """The jobs; the digests of large files are remembered in the cache."""
    digests = Digests(expand_home(data.cache_dir))
    found = _jobs(data, tokenizer, digests.of)
    digests.save()
    return found


def _jobs(
    data: config.Data, tokenizer: Tokenizer, digest: Callable[[SourceFile], str]
) -> tuple[list[_Job], BlockBuilder]:
    if not data.domains:
        raise UserError("data.domains is empty; name at least one domain with its sources")
    expanded = [expand(data.root, domain.sources, data.cache_dir) for domain in data.domains]
    _refuse_files_standing_twice(data, expanded)
    cache_dir, benchmarks = expand_home(data.cache_dir), None
    if data.decontaminate.path:
        benchmarks = Benchmarks.read(expand_home(data.decontaminate.path))
    builder = BlockBuilder(cache_dir / "blocks", data, tokenizer, benchmarks)
    typing, jobs = Typing.of(data, tokenizer.template), []
    for domain, files in zip(data.domains, expanded, strict=True):
        prompt = resolve_prompt(data, domain)
        recipe: dict[str, Any] = {
            "cache_format": CACHE_FORMAT,
            **tokenizer.template.recipe(),
            "tokenizer": tokenizer.fingerprint,
            "prompt": prompt,
            "row_system": data.row_system,
            "too_long": data.too_long,
            "limit": data.max_instruction_tokens or data.sequence_length,
            "decontaminate": benchmarks and [benchmarks.fingerprint, data.decontaminate.on_hit],
            **_rendering_options(data, tokenizer),
            # Left out if all is text, so that caches from before there was a choice are found.
            **({"typed": typing} if any(typing) else {}),
        }
        with domain_errors(domain.name, cache_dir):
            found = [[digest(file) for file in part] for part in files]
        wanted = [
            (s.format, s.max_rows, part) for s, part in zip(domain.sources, found, strict=True)
        ]
        jobs.append(_Job(domain, prompt, files, found, recipe, cache_dir / _hash([recipe, wanted])))
    return jobs, builder


def _rendering_options(data: config.Data, tokenizer: Tokenizer) -> dict[str, Any]:
    """The options of rendering that differ from the default, so that old keys stay as they are."""
    template, keys = tokenizer.template, ("thinking", "rewritten_history")
    if data.thinking != "keep" and not template.typed:
        raise UserError(
            f"data.thinking: {data.thinking} needs a chat template of the checkpoint's own; "
            f"{template.name} has thinking as text of the answer; leave data.thinking unset"
        )
    return {k: getattr(data, k) for k in keys if getattr(data, k) != getattr(config.Data(), k)}


def _refuse_files_standing_twice(data: config.Data, expanded: list[list[list[SourceFile]]]) -> None:
    seen: dict[Path, str] = {}
    for domain, files in zip(data.domains, expanded, strict=True):
        for file in chain(*files):
            path = file.path.resolve()
            if path in seen:
                raise UserError(
                    f"{file.name} is listed twice, in domain {seen[path]} and in domain "
                    f"{domain.name}; leave it in one source"
                )
            seen[path] = domain.name


def _with_missing(
    jobs: Sequence[_Job], opened: Sequence[DomainCache | None], builder: BlockBuilder
) -> list[DomainCache]:
    """The caches of all jobs; those that are None are built."""
    missing = [job for job, cache in zip(jobs, opened, strict=True) if cache is None]
    if not missing:
        return [cache for cache in opened if cache]
    with _running(missing, builder):
        _build([item for job in missing for item in chain(*job.items)], builder)
        return [cache or _assemble(job, builder) for job, cache in zip(jobs, opened, strict=True)]


@contextmanager
def _running(jobs: Sequence[_Job], builder: BlockBuilder) -> Iterator[None]:
    """Marks this run as alive while it builds the jobs, see `leftovers`."""
    names = ", ".join(job.domain.name for job in jobs)
    cache_dir = builder.folder.parent
    with domain_errors(names, cache_dir), running([cache_dir, builder.folder], builder.run):
        yield


def _build(items: list[WorkItem], builder: BlockBuilder) -> None:
    """Builds the blocks that are missing, in at most one process for each full block."""
    left = [item for item in items if builder.finished(item) is None]
    if not left:
        return
    most = builder.data.workers or _cores()
    useful = full_blocks(sum(item.size for item in left))
    workers = max(1, min(most, useful, len(left)))
    sizes: Counter[str] = Counter()
    for item in left:
        sizes[item.domain] += item.size
    with (
        domain_errors(", ".join(sizes), builder.folder.parent),
        progress_bars() as progress,
    ):
        bars = {name: progress.add_task(name, total=size) for name, size in sizes.items()}

        def advance(item: WorkItem) -> None:
            progress.advance(bars[item.domain], item.size)

        run_work(left, builder, workers, advance)


def _cores() -> int:
    """The cores that this process may use; a cluster's job may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _assemble(job: _Job, builder: BlockBuilder) -> DomainCache:
    """Builds the domain's cache from its finished blocks."""
    with domain_errors(job.domain.name, job.directory.parent):
        found = [[pair for item in items for pair in _found(item, builder)] for items in job.items]
        write_domain(job.directory, found, builder.run)
    cache = job.open(builder)
    if cache is None:
        raise UserError(f"{job.directory} was changed while it was in use; run again")
    return cache


def _found(item: WorkItem, builder: BlockBuilder) -> list[tuple[Block, FinishedBlock | None]]:
    finished = builder.finished(item)
    if finished is None:
        raise UserError(f"{builder.folder} was changed while it was in use; run again")
    return list(zip_longest(item.blocks, finished))


def _refuse_bad_rows(job: _Job, manifest: dict[str, Any]) -> None:
    """Applies data.on_bad_row: error to a cache that was prepared under `drop`."""
    paths = {file.name: file.path for file in chain(*job.files)}
    for row in manifest["examples"]:
        if row["reason"] not in BY_CONFIG:
            place = f"{paths[row['file']]}:{row['line']}"
            raise bad_row_error(place, row["reason"], row["detail"])
    for name in manifest["empty_files"]:
        raise UserError(f"{paths[name]} is empty; remove it or set data.on_bad_row: drop")


def _summary(cache: DomainCache) -> str:
    manifest = cache.manifest
    tokens, loss_tokens, _ = cache.lengths.sum(axis=0, dtype=np.int64).tolist()
    changed = changes(manifest)
    return (
        f"{manifest['kept']:,} of {manifest['read']:,} rows kept"
        f"{f' ({changed})' if changed else ''}, {tokens:,} tokens, "
        f"{loss_tokens:,} with loss; dropped: {counts_text(manifest['dropped'])}"
    )


def _log_benchmarks(benchmarks: Benchmarks) -> None:
    log.info(f"looking for copies of {benchmarks.questions:,} benchmark questions")
    if benchmarks.skipped:
        log.warning(f"found no question in {', '.join(benchmarks.skipped)}")

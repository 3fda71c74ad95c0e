"""The checkpoint that a run begins from: ours, or published weights that are imported once."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from moi_jax.checkpoints.base import find_base
from moi_jax.checkpoints.checksums import verify_arrays
from moi_jax.checkpoints.damage import DamagedCheckpoint
from moi_jax.checkpoints.hf.importer import published_items, write_checkpoint
from moi_jax.checkpoints.hf.reader import describe_published, open_published
from moi_jax.checkpoints.hf.source import HUB_FORM, PublishedSource, find_source
from moi_jax.checkpoints.items import FORMAT, ModelItems, find_step, read_items
from moi_jax.common.atomic_files import check_writable
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.common.home import expand_home
from moi_jax.common.locations import is_url
from moi_jax.common.progress import byte_bar
from moi_jax.config import Data
from moi_jax.data.cache.digests import Digests
from moi_jax.data.sources.readers import SourceFile
from moi_jax.parallel import hosts

IMPORTED = "imported"  # the folder in data.cache_dir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """What model.init_from names.

    Attributes:
      name: its path, or the id of the repository with its commit.
      read: where the items were read, for messages.
      items: everything except the parameters.
      source: the published files; None for a checkpoint of ours.
    """

    name: Path
    read: Path
    items: ModelItems
    source: PublishedSource | None = None

    def checkpoint(self, cache_dir: Path) -> Path:
        """The checkpoint of ours with the parameters; published weights are imported if needed.

        Raises:
          UserError: the weights are missing or damaged, or the cache cannot be written.
        """
        if self.source is None:
            return find_step(self.name)
        return _import_once(self.source, self.items, expand_home(cache_dir))


def open_start(named: Path, tokenizer: Path | None = None) -> Start:
    """Opens what model.init_from names, without its weights.

    Args:
      tokenizer: a directory or repository with tokenizer files, in the place of the published ones.

    Raises:
      UserError: there is nothing of that name, or it is damaged.
    """
    if is_url(named):
        step = find_step(named)
        return Start(named, step, read_items(step))
    source = find_source(named)
    if not source.path.exists():
        raise UserError(
            f"{named} is no checkpoint: it does not exist. Give a checkpoint or a run of moi_jax, "
            f"a directory of published weights, a .gguf file, or {HUB_FORM}"
        )
    if not ((source.path / "config.json").is_file() or source.path.suffix == ".gguf"):
        return Start(named, named, read_items(named))
    if tokenizer:
        tokenizer = find_source(tokenizer).path
    items = published_items(source, describe_published(source.path), tokenizer)
    name = source.pinned or named
    return Start(name, name, items, source)


def whole_checkpoint(named: Path, cache_dir: Path, tokenizer: Path | None = None) -> Path:
    """The checkpoint of moi_jax that `named` is, or that is imported from it into the cache.

    Args:
      tokenizer: see `open_start`.
    """
    with hosts.one_first(cache_dir, "importing the weights"):
        return open_start(named, tokenizer).checkpoint(cache_dir)


def base_checkpoint(named: Path, cache_dir: Path, tokenizer: Path | None = None) -> Path:
    """The step with the base of adapters that `named` leads to.

    Of a checkpoint that holds adapters alone, it is the base of these.

    Args:
      named, cache_dir, tokenizer: see `whole_checkpoint`.

    Raises:
      UserError: there is none, or it holds other adapters beside its base.
    """
    step = find_step(whole_checkpoint(named, cache_dir, tokenizer)).absolute()
    items = read_items(step)
    if items.base:
        return find_base(step, items.base, None)
    if items.model.adapter:
        raise UserError(
            f"{step} has adapters of its own, so it is the base of no others; name the checkpoint "
            f"or the published weights from which they were trained"
        )
    return step


def chosen_base(step: Path, items: ModelItems, named: Path | None) -> Path | None:
    """The checkpoint that a user names as the base of adapters; None for the recorded one.

    Raises:
      UserError: the checkpoint in `step` needs none, or there is none of that name.
    """
    if named is None:
        return None
    if items.base is None:
        raise UserError(f"{step} holds all parameters, so leave out the base ({named})")
    return base_checkpoint(named, Data.model_fields["cache_dir"].default)


def continued_start(named: Path, own: Path) -> Start:
    """The start of a run that has a checkpoint, `own`: what model.init_from names is not opened."""
    items = read_items(own)
    commit, base = (items.provenance.get(key) for key in ("commit", "base"))
    if commit and str(named).split("@")[0] == base:
        named = Path(f"{base}@{commit}")  # the run began there, whatever is the newest commit now
    return Start(named, own, items)


def _import_once(source: PublishedSource, items: ModelItems, cache_dir: Path) -> Path:
    """The checkpoint in the cache that is made from `source`; it is written if it is not there.

    The end of its name tells the items and the content of the weights.
    """
    content = {
        "model": items.model.to_json(),
        "tokenizer": items.tokenizer,
        "prompts": items.prompts,
        "provenance": items.provenance,
    }
    key = json_fingerprint([FORMAT, content, _weights(source, cache_dir)])
    folder = cache_dir / IMPORTED
    path = folder / f"{Path(source.base).name}-{key}"
    if path.is_dir() and _is_whole(path):
        log.info(f"{source.base}: the weights are cached in {path}")
        return path
    check_writable(folder)
    with _lock(folder / f"{path.name}.lock", source.base):
        if path.is_dir() and not _is_whole(path):
            log.warning(f"the weights of {source.base} in {path} are damaged, and are made anew")
            shutil.rmtree(path)
        for part in folder.glob(f".*-{key}.*"):  # of an import that was killed
            shutil.rmtree(part)
        if not path.is_dir():  # another process may have written it meanwhile
            log.info(f"{source.base}: importing the weights into the cache, this once")
            source.fetch_weights()
            write_checkpoint(open_published(source.path), items, path)
    return path


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_items(checkpoint)
        verify_arrays(checkpoint, ["parameters"])
    except DamagedCheckpoint:
        return False
    return (checkpoint / SUMS).is_file()


def _weights(source: PublishedSource, cache_dir: Path) -> dict[str, str]:
    """The digests of local weights. Those of a repository are known by its commit."""
    if source.commit:
        return {}
    digests, files = Digests(cache_dir), [SourceFile(p.name, p) for p in source.weight_files]
    with byte_bar("hashing the weights", sum(file.size for file in files)) as progress:
        found = {}
        for file in files:
            found[file.name] = digests.of(file)
            progress(file.size)
    digests.save()
    return found


@contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Holds a lock between processes, and says so if it has to wait for another one."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info(f"{what}: waiting for another process that imports the weights")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()

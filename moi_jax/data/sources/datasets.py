"""Sources of kind tfds and hf: the rows of a TFDS builder or a Hugging Face dataset, as files are.

Both libraries are extras, imported where they are used.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from filelock import FileLock

from moi_jax.common.errors import UserError
from moi_jax.config import Source
from moi_jax.data import tfds_datasets
from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.readers import SourceFile

HELD = 1000  # rows of a Hugging Face dataset in memory at a time


def open_dataset(root: Path, source: Source, cache_dir: Path) -> SourceFile:
    """The rows of a source of kind tfds (built now if it is not) or hf (downloaded if need be).

    Args:
      root: data.root; `manual_dir` and local directories are below it.
      source: names a builder or a dataset.
      cache_dir: data.cache_dir; builders write to its folder tfds.

    Raises:
      UserError: a library is missing, or there is no such set, subset or split, or no network.
    """
    if source.tfds is not None:
        return _open_tfds(root, source, source.tfds, cache_dir.expanduser() / "tfds")
    assert source.hf is not None
    return _open_hf(root, source, source.hf)


@dataclass(frozen=True)
class _DatasetFile(SourceFile, ABC):
    """A split of a dataset on disk: a `SourceFile` whose lines are row numbers.

    Attributes:
      path: stands for the split; no file lies there.
      files: what holds the rows.
      split: name and slice, as in `train[:10%]`.
      held: bytes of the rows, nearly.
    """

    files: tuple[Path, ...]
    split: str
    held: int
    splittable = False

    @property
    def size(self) -> int:
        return self.held

    def digest(self) -> str:
        """sha256 hex of the files and the split."""
        digest = hashlib.sha256(self.split.encode())
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def rows(self, start: int = 0, end: int | None = None) -> Iterator[RawRow]:
        """All the rows, whatever the range; each as JSON, so that `parse` is the one border."""
        for line, raw in enumerate(self._json(), 1):
            yield RawRow(line, len(raw), raw)

    @abstractmethod
    def _json(self) -> Iterator[bytes]:
        """Each row as JSON."""


@dataclass(frozen=True)
class _TfdsFile(_DatasetFile):
    def _json(self) -> Iterator[bytes]:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.path.parent)
        features = builder.info.features
        whole = list(features.keys()) == ["json"]  # written by a builder of ours
        try:
            rows = builder.as_data_source(split=self.split)
            for index in range(len(rows)):
                row = rows[index]
                if whole and row["json"] is None:  # so a file that lost its middle reads
                    raise RuntimeError(f"row {index + 1} is gone")
                yield row["json"] if whole else json.dumps(_plain(row, features)).encode()
        except RuntimeError as error:  # what ArrayRecord raises
            raise UserError(
                f"{self.path.parent} is damaged ({error}); delete it and it is built anew"
            ) from None


@dataclass(frozen=True)
class _HfFile(_DatasetFile):
    dataset: Any  # datasets.Dataset; pickles as the names of its files

    def _json(self) -> Iterator[bytes]:
        for first in range(0, len(self.dataset), HELD):
            columns = self.dataset[first : first + HELD]
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield json.dumps(row, default=str).encode()


def _open_tfds(root: Path, source: Source, name: str, data_dir: Path) -> SourceFile:
    try:
        import importlib_resources  # noqa: F401 - tensorflow_datasets needs and does not ask for it
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f'tfds: {name} needs a library that is missing ({error}): pip install "moi_jax[tfds]"'
        ) from None
    manual_dir = None
    if source.manual_dir is not None:
        manual_dir = root / source.manual_dir.expanduser()
        if not manual_dir.is_dir():
            raise UserError(f"tfds: {name}: manual_dir {manual_dir} is no directory")
        # A folder of its own: other copies are other data.
        data_dir = data_dir / f"manual-{_content(manual_dir)}"
    # The code of a set and what it downloads may raise anything; to the user it is one line.
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = _builder(name, data_dir)
        with FileLock(data_dir / f"{builder.name}.lock"):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
        split = builder.info.splits[source.split]
    except ImportError as error:
        raise UserError(
            f"tfds: {name} cannot be built without {error.name}; install it, or build the set "
            f"elsewhere as array_record and copy it to {data_dir}"
        ) from None
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds: no set is named {name}; built in are {', '.join(tfds_datasets.NAMES)}, and "
            f"TFDS has its own"
        ) from None
    except Exception as error:
        raise UserError(f"tfds: {name}: {_one_line(error)}") from error
    whole = builder.info.splits[source.split.partition("[")[0]] if "[" in source.split else split
    held = whole.num_bytes * split.num_examples // max(whole.num_examples, 1)
    files = tuple(Path(path) for path in split.filepaths)
    place = Path(builder.data_dir) / source.split
    return _TfdsFile(f"tfds:{name}:{source.split}", place, files, source.split, held)


def _builder(name: str, data_dir: Path) -> Any:
    """The builder of name or name/config, ours before the one of the same name in TFDS.

    A set that lies in `data_dir` already is read even where its code cannot be imported.
    """
    import tensorflow_datasets as tfds

    short, _, config = name.partition("/")
    if short not in tfds_datasets.NAMES:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder_class = tfds_datasets.builder_class(short)
    return builder_class(config=config or None, data_dir=data_dir, file_format="array_record")


def _one_line(error: Exception) -> str:
    """What an error of a library says, with its cause where it does not say that itself."""
    texts = [str(error), str(error.__cause__ or "")]
    return shorten(": ".join(filter(None, texts)) or repr(error), 500)


def _content(directory: Path) -> str:
    """Names the content of a folder, so that a set built from other files is another set."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)}\0".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _plain(value: Any, feature: Any) -> Any:
    """A value that TFDS decoded, as JSON has it: text for bytes, lists of rows for columns."""
    from tensorflow_datasets.core.features import FeaturesDict

    if isinstance(feature, FeaturesDict):
        return {key: _plain(element, feature[key]) for key, element in value.items()}
    inner = getattr(feature, "feature", None)  # of a Sequence
    if isinstance(inner, FeaturesDict) and isinstance(value, dict):
        rows = zip(*value.values(), strict=True)
        return [_plain(dict(zip(value, row, strict=True)), inner) for row in rows]
    if isinstance(value, bytes):
        # Half a character becomes a lone surrogate, which the border counts as a bad row.
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), None)
    if isinstance(value, list | tuple):
        return [_plain(element, None) for element in value]
    if isinstance(value, dict):
        return {key: _plain(element, None) for key, element in value.items()}
    return value


def _open_hf(root: Path, source: Source, name: str) -> SourceFile:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"hf: {name} needs a library that is missing (datasets): "
            f'pip install "moi_jax[datasets]"'
        ) from None
    local = root / Path(name).expanduser()
    if not local.is_dir() and (name[0] in "./~" or name.count("/") > 1):
        raise UserError(f"hf: {name}: {local} is no directory, and no id of the hub has this form")
    try:
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            dataset = _saved(datasets.load_from_disk(str(local)), source.split)
        else:
            found = str(local) if local.is_dir() else name
            dataset = datasets.load_dataset(found, source.subset, split=source.split)
    except ConnectionError as error:
        raise UserError(
            f"hf: {name}: {_one_line(error)}; mend the id or the network, log in with "
            f"`hf auth login` where the set asks for it, or name a local directory"
        ) from None
    except Exception as error:
        raise UserError(f"hf: {name}: {_one_line(error)}") from error
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    label = "/".join(filter(None, (name, source.subset)))
    place = (local if local.is_dir() else Path(name)) / (source.subset or "") / source.split
    shown = f"hf:{label}:{source.split}"
    return _HfFile(shown, place, files, source.split, dataset.data.nbytes, dataset)


def _saved(dataset: Any, split: str) -> Any:
    """The split of what `save_to_disk` wrote: a dict of datasets by split, or one, its only."""
    splits = dataset if isinstance(dataset, dict) else {str(dataset.split or "train"): dataset}
    if split not in splits:
        raise ValueError(f"Unknown split {split!r}. Should be one of {sorted(splits)}.")
    return splits[split]

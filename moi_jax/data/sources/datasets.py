"""Sources of kind tfds and hf: a TFDS or Hugging Face dataset as if it were a file of rows.

Both libraries are extras, so they are imported where they are used.
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
from moi_jax.common.home import expand_home
from moi_jax.config import Source
from moi_jax.data import tfds_datasets
from moi_jax.data.sources.containers import RawRow
from moi_jax.data.sources.readers import SourceFile

HELD = 1000  # rows of a Hugging Face dataset that are in memory at a time


def open_dataset(root: Path, source: Source, cache_dir: Path) -> SourceFile:
    """Opens a source of kind tfds (built if it is missing) or hf (downloaded if it is missing).

    Args:
      root: data.root; `manual_dir` and local directories are relative to it.
      source: names a builder or a dataset.
      cache_dir: data.cache_dir; builders write to its folder `tfds`.

    Raises:
      UserError: a library is missing; or the dataset, subset, split or network is.
    """
    if source.tfds is not None:
        return _open_tfds(root, source, source.tfds, expand_home(cache_dir) / "tfds")
    assert source.hf is not None
    return _open_hf(root, source, source.hf)


@dataclass(frozen=True)
class _DatasetFile(SourceFile, ABC):
    """A split of a dataset on disk, as a `SourceFile` whose line numbers are row numbers.

    Attributes:
      path: identifies the split; there is no such file.
      files: the files that hold the rows.
      split: name and slice, as in `train[:10%]`.
      held: about how many bytes the rows have.
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
        """All rows, whatever the range; as JSON, so that `parse` checks rows of every kind."""
        for line, raw in enumerate(self._json(), 1):
            yield RawRow(line, len(raw), raw)

    @abstractmethod
    def _json(self) -> Iterator[bytes]:
        """Yields each row as JSON."""


@dataclass(frozen=True)
class _TfdsFile(_DatasetFile):
    def _json(self) -> Iterator[bytes]:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.path.parent)
        features = builder.info.features
        whole = list(features.keys()) == ["json"]  # written by one of our builders
        try:
            rows = builder.as_data_source(split=self.split)
            for index in range(len(rows)):
                row = rows[index]
                if whole and row["json"] is None:  # how a file reads that has lost its middle
                    raise RuntimeError(f"row {index + 1} is missing")
                yield row["json"] if whole else json.dumps(_plain(row, features)).encode()
        except RuntimeError as error:  # from ArrayRecord
            raise UserError(
                f"{self.path.parent} is damaged ({error}); delete it and run again"
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
        import importlib_resources  # noqa: F401 - tensorflow_datasets needs it but does not say so
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f'tfds: {name} needs a library that is missing ({error}): pip install "moi_jax[tfds]"'
        ) from None
    manual_dir = None
    if source.manual_dir is not None:
        manual_dir = root / expand_home(source.manual_dir)
        if not manual_dir.is_dir():
            raise UserError(f"tfds: {name}: manual_dir {manual_dir} is not a directory")
        # Data from other files goes to another folder.
        data_dir = data_dir / f"manual-{_content(manual_dir)}"
    # The code of a dataset and its download may raise anything; the user gets one line.
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
            f"tfds: {name} cannot be built without {error.name}; install it, or build the dataset "
            f"elsewhere as array_record and copy it to {data_dir}"
        ) from None
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds: there is no dataset {name}; use one of {', '.join(tfds_datasets.NAMES)}, or "
            f"one that TFDS has"
        ) from None
    except Exception as error:
        raise UserError(f"tfds: {name}: {_one_line(error)}") from error
    whole = builder.info.splits[source.split.partition("[")[0]] if "[" in source.split else split
    held = whole.num_bytes * split.num_examples // max(whole.num_examples, 1)
    files = tuple(Path(path) for path in split.filepaths)
    place = Path(builder.data_dir) / source.split
    return _TfdsFile(f"tfds:{name}:{source.split}", place, files, source.split, held)


def _builder(name: str, data_dir: Path) -> Any:
    """The builder of `name` or `name/config`; ours wins over TFDS's builder of the same name.

    A dataset that is already in `data_dir` is read even if its code cannot be imported.
    """
    import tensorflow_datasets as tfds

    short, _, config = name.partition("/")
    if short not in tfds_datasets.NAMES:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder_class = tfds_datasets.builder_class(short)
    return builder_class(config=config or None, data_dir=data_dir, file_format="array_record")


def _one_line(error: Exception) -> str:
    """The message of a library's error, followed by that of its cause."""
    texts = [str(error), str(error.__cause__ or "")]
    return shorten(": ".join(filter(None, texts)) or repr(error), 500)


def _content(directory: Path) -> str:
    """A digest of a folder's content: datasets built from other files get another folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)}\0".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _plain(value: Any, feature: Any) -> Any:
    """A value from TFDS in the form of JSON: bytes become text, columns become lists of rows."""
    from tensorflow_datasets.core.features import FeaturesDict

    if isinstance(feature, FeaturesDict):
        return {key: _plain(element, feature[key]) for key, element in value.items()}
    inner = getattr(feature, "feature", None)  # of a Sequence
    if isinstance(inner, FeaturesDict) and isinstance(value, dict):
        rows = zip(*value.values(), strict=True)
        return [_plain(dict(zip(value, row, strict=True)), inner) for row in rows]
    if isinstance(value, bytes):
        # Invalid UTF-8 becomes a lone surrogate, and `to_conversation` refuses the row.
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
    local = root / expand_home(Path(name))
    if not local.is_dir() and (name[0] in "./~" or name.count("/") > 1):
        raise UserError(f"hf: {name} is neither a directory ({local}) nor an id of the hub")
    try:
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            dataset = _saved(datasets.load_from_disk(str(local)), source.split)
        else:
            found = str(local) if local.is_dir() else name
            dataset = datasets.load_dataset(found, source.subset, split=source.split)
    except ConnectionError as error:
        raise UserError(
            f"hf: {name}: {_one_line(error)}; check the id and the network, log in with "
            f"`hf auth login` if the dataset needs it, or name a local directory"
        ) from None
    except Exception as error:
        raise UserError(f"hf: {name}: {_one_line(error)}") from error
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    label = "/".join(filter(None, (name, source.subset)))
    place = (local if local.is_dir() else Path(name)) / (source.subset or "") / source.split
    shown = f"hf:{label}:{source.split}"
    return _HfFile(shown, place, files, source.split, dataset.data.nbytes, dataset)


def _saved(dataset: Any, split: str) -> Any:
    """The split of a dataset written by `save_to_disk`: a dict of splits, or a single split."""
    splits = dataset if isinstance(dataset, dict) else {str(dataset.split or "train"): dataset}
    if split not in splits:
        raise ValueError(f"Unknown split {split!r}. Should be one of {sorted(splits)}.")
    return splits[split]

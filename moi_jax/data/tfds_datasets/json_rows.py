"""The base of our TFDS builders: each row is stored as JSON in one text feature, `json`."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import requests
import tensorflow_datasets as tfds

GZIP = b"\x1f\x8b"
SECONDS = 20  # how long a server may take to answer


class JsonRows(tfds.core.GeneratorBasedBuilder):
    """A dataset of JSON rows, unchanged and in order: row n of a split is row n of its files.

    A text feature keeps trees, missing keys and turns of different shapes as they are; typed
    features would need a schema and fill the gaps.

    Attributes:
      FILES: split -> patterns of its files below `manual_dir`.
      URLS: split -> URL; empty if the dataset has no permanent one. checksums.tsv beside a builder
        holds the checksums of files that we checked; for other files TFDS stores the checksum
        beside the download.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The rows as published."}
    FILES: ClassVar[Mapping[str, tuple[str, ...]]]
    URLS: ClassVar[Mapping[str, str]] = {}
    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str]
    LICENCE: ClassVar[str]
    CITATION: ClassVar[str]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict({"json": tfds.features.Text()}),
            disable_shuffling=True,
            homepage=self.HOMEPAGE,
            license=self.LICENCE,
            citation=self.CITATION,
        )

    def belongs(self, row: dict[str, Any], split: str) -> bool:
        """Whether a row of the split's files belongs to the split; for files of several splits."""
        return True

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        splits = {}
        for split, paths in self._paths(dl_manager).items():
            rows = self._rows(split, paths)
            # TFDS refuses a split without rows; a part of a dataset may lack some splits.
            if first := next(rows, None):
                splits[split] = self._generate_examples(chain([first], rows))
        return splits

    def _rows(self, split: str, paths: list[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            for row in read_rows(path):
                if self.belongs(row, split):
                    yield row

    def _paths(self, dl_manager: Any) -> dict[str, list[Path]]:
        """The files of each split, from manual_dir if there is one, otherwise downloaded."""
        try:
            manual_dir = Path(dl_manager.manual_dir)
        except AssertionError:  # TFDS raises it if there is no such folder
            if not self.URLS:
                raise FileNotFoundError(self.MANUAL_DOWNLOAD_INSTRUCTIONS) from None
            self._check_network()
            # A file of several splits is downloaded once, because its URL is the same.
            downloaded = dl_manager.download(dict(self.URLS))
            return {split: [Path(path)] for split, path in downloaded.items()}
        found = {split: _matches(manual_dir, patterns) for split, patterns in self.FILES.items()}
        if not any(found.values()):
            wanted = " or ".join(dict.fromkeys(chain(*self.FILES.values())))
            raise FileNotFoundError(f"there is no {wanted} in {manual_dir}")
        return found

    def _check_network(self) -> None:
        """Fails at once if the server cannot be reached, and says what to do; TFDS would retry."""
        url = next(iter(self.URLS.values()))
        try:
            requests.head(url, timeout=SECONDS)
        except requests.RequestException as error:
            server = url.split("/")[2]
            raise ConnectionError(
                f"{server} cannot be reached ({type(error).__name__}). "
                f"{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            ) from None

    def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator[Any]:
        for number, row in enumerate(rows):
            yield number, {"json": json.dumps(row)}


def _matches(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files that match any of the patterns, sorted by name."""
    return sorted(
        {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, gzipped or not: one object in each line, an array of objects, or one.

    Raises:
      ValueError: the file is none of these; the message names the file and the line.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP
    with gzip.open(path) if packed else open(path, "rb") as file:
        first = file.readline()
        if not _is_row(first):
            yield from _whole(path, first + file.read())
            return
        for line, content in enumerate(chain([first], file), 1):
            if content.strip():
                try:
                    yield json.loads(content)
                except ValueError as error:
                    raise ValueError(f"{path}:{line}: {error}") from None


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _whole(path: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return rows if isinstance(rows, list) else [rows]

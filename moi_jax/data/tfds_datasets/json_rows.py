"""What the builders share: rows of JSON in, one text feature `json` a row out, nothing reshaped."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import requests
import tensorflow_datasets as tfds

GZIP = b"\x1f\x8b"
SECONDS = 20  # a server may take to answer


class JsonRows(tfds.core.GeneratorBasedBuilder):
    """A set of JSON rows, kept whole and in order: row n of a split is row n of its files.

    Trees, missing keys and turns of differing shapes pass through a text feature unharmed, where
    typed features would need a schema and fill the gaps.

    Attributes:
      FILES: each split with the patterns of its files below `manual_dir`.
      URLS: each split with its address; empty where the set has no lasting one. checksums.tsv
        beside a builder holds the sums of those files that were checked; of the others TFDS
        writes the sum beside the download.
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
        """Whether a row of the split's files is of the split; files that hold several say."""
        return True

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        splits = {}
        for split, paths in self._paths(dl_manager).items():
            rows = self._rows(split, paths)
            # TFDS refuses a split without rows; of a part of a set some may have none.
            if first := next(rows, None):
                splits[split] = self._generate_examples(chain([first], rows))
        return splits

    def _rows(self, split: str, paths: list[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            for row in read_rows(path):
                if self.belongs(row, split):
                    yield row

    def _paths(self, dl_manager: Any) -> dict[str, list[Path]]:
        """The files of each split: all from manual_dir where there is one, else downloaded."""
        try:
            manual_dir = Path(dl_manager.manual_dir)
        except AssertionError:  # what TFDS raises for a folder that is not there
            if not self.URLS:
                raise FileNotFoundError(self.MANUAL_DOWNLOAD_INSTRUCTIONS) from None
            self._check_network()
            # A file of several splits is downloaded once: its address is the same.
            downloaded = dl_manager.download(dict(self.URLS))
            return {split: [Path(path)] for split, path in downloaded.items()}
        found = {split: _matches(manual_dir, patterns) for split, patterns in self.FILES.items()}
        if not any(found.values()):
            wanted = " or ".join(dict.fromkeys(chain(*self.FILES.values())))
            raise FileNotFoundError(f"there is no {wanted} in {manual_dir}")
        return found

    def _check_network(self) -> None:
        """Fails soon and with the way out, where TFDS tries for minutes."""
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
    """The files of any of the patterns, in the order of their names."""
    return sorted(
        {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, gzipped or not: an object a line, an array of them, or one object.

    Raises:
      ValueError: the file is none of these; the message names file and line.
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

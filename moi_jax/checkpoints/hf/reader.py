"""Reading published checkpoints: a directory of safetensors shards, or a .gguf file."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles, read_bytes
from moi_jax.checkpoints.hf.weights import import_parameters, published_shapes, redundant_tensors
from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig, read_hf_config
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import map_parameters


class PublishedModel:
    """What is known of a published model without its weights.

    Attributes:
      config: the architecture.
      token_ids: bos_token_id and the like, as config.json has them.
      tokenizer_files: name -> text, if the weight file itself holds a tokenizer (GGUF).
    """

    tokenizer_files: Mapping[str, str] = {}

    def __init__(self, config_json: str | bytes, path: Path):
        """Raises UserError if the text, which comes from `path`, is no supported config.json."""
        self.config: ModelConfig = read_hf_config(config_json, str(path))
        values = json.loads(config_json)
        self.token_ids = {key: value for key, value in values.items() if key.endswith("_token_id")}


class PublishedCheckpoint(PublishedModel, ABC):
    """A published checkpoint that holds exactly the tensors of its architecture.

    Attributes:
      dtypes: name -> dtype of every tensor.
    """

    dtypes: dict[str, np.dtype]

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor in its published layout."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        shapes = published_shapes(self.config)
        return sum(math.prod(shape) * self.dtypes[n].itemsize for n, shape in shapes.items())

    @property
    def common_dtype(self) -> np.dtype:
        """The dtype of all tensors; float32, which holds any of them, if they are mixed."""
        found = set(self.dtypes.values())
        return found.pop() if len(found) == 1 else np.dtype(np.float32)


class SafetensorsCheckpoint(PublishedCheckpoint):
    """A directory of config.json and safetensors shards."""

    def __init__(self, directory: Path):
        """Raises UserError as `open_published` does."""
        path = directory / "config.json"
        super().__init__(read_bytes(path), path)
        expected = published_shapes(self.config)
        self._files = TensorFiles(directory)
        headers = self._files.headers
        redundant = redundant_tensors(self.config)
        check_names(directory, headers.keys() - redundant.keys(), expected)
        for name in headers.keys() & redundant.keys():
            self._check_copy(name, redundant[name])
        for name, shape in expected.items():
            if headers[name].shape != shape:
                raise UserError(
                    f"{headers[name].path}: {name} has shape {headers[name].shape}, config.json "
                    f"says {shape}"
                )
        self.dtypes = {name: headers[name].dtype for name in expected}

    def read(self, name: str) -> np.ndarray:
        return self._files.read(name)

    def _check_copy(self, name: str, of: str | None) -> None:
        if of is not None and not np.array_equal(self.read(name), self.read(of)):
            raise UserError(
                f"{self._files.headers[name].path}: {name} is not {of}, though config.json ties "
                f"them; correct tie_word_embeddings or remove one of the two"
            )


class GgufPublished(PublishedCheckpoint):
    """A .gguf file; its weights are dequantised to float32."""

    def __init__(self, path: Path):
        """Raises UserError as `open_published` does."""
        from moi_jax.checkpoints.hf.gguf import open_gguf

        self._path = path
        self._file = open_gguf(path)
        super().__init__(json.dumps(self._file.config_json), path)
        self._expected = published_shapes(self.config)
        check_names(path, self._file.names, self._expected)
        self.dtypes = {name: np.dtype(np.float32) for name in self._expected}
        self.tokenizer_files = self._file.tokenizer_files

    def read(self, name: str) -> np.ndarray:
        value = self._file.read(name)
        if value.shape != self._expected[name]:
            raise UserError(
                f"{self._path}: {name} has shape {value.shape}, its metadata say "
                f"{self._expected[name]}"
            )
        return value


def open_published(source: Path) -> PublishedCheckpoint:
    """Opens a published checkpoint and checks its headers; weights are not read yet.

    Raises:
      UserError: a file is missing or damaged (the message names it), or the tensors are not
        exactly those of the architecture in config.json.
    """
    if source.suffix == ".gguf" and source.is_file():
        return GgufPublished(source)
    if source.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{source}: pickled weights can run code and are not read; use safetensors")
    if not source.is_dir():
        raise UserError(f"{source} is no directory and no .gguf file; give a published checkpoint")
    return SafetensorsCheckpoint(source)


def describe_published(source: Path) -> PublishedModel:
    """Reads the architecture of a published checkpoint; its weights need not be there.

    Raises:
      UserError: config.json, or the .gguf file, is missing, damaged or not supported.
    """
    if source.is_file():
        return open_published(source)  # a .gguf file holds everything
    path = source / "config.json"
    return PublishedModel(read_bytes(path), path)


def read_published(source: Path, dtype: np.typing.DTypeLike | None) -> tuple[ModelConfig, Tree]:
    """Architecture and all parameters (numpy) of a published checkpoint.

    Args:
      dtype: of the parameters; None keeps the published one.

    Raises:
      UserError: see `open_published`.
    """
    published = open_published(source)
    wanted = dtype or published.common_dtype
    flat = dict(import_parameters(published.config, published.read, wanted))
    return published.config, map_parameters(published.config, lambda path, _: flat[path])


def check_names(source: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises UserError unless both name the same tensors."""
    found, expected = set(found), set(expected)
    for what, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{source} {what} {len(names)} tensors by its config: {shown}")

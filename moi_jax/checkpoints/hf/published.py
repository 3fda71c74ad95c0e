"""Published checkpoints as they are read: a directory of safetensors shards, or a .gguf file."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moi_jax.checkpoints.hf.weights import import_parameters, published_shapes, redundant_tensors
from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig, read_hf_config
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import map_parameters

# The names in the headers of safetensors; weights in any other are quantised.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Published(ABC):
    """A published checkpoint whose tensors are exactly those of its architecture.

    Attributes:
      config: the architecture.
      dtypes: name -> dtype of every tensor.
      token_ids: bos_token_id and its like, as the configuration has them.
      tokenizer_files: where it carries a tokenizer itself (GGUF), its files; else none.
    """

    config: ModelConfig
    dtypes: dict[str, np.dtype]
    token_ids: dict[str, Any]
    tokenizer_files: Mapping[str, str] = {}

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor, in its published layout."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        shapes = published_shapes(self.config)
        return sum(math.prod(shape) * self.dtypes[n].itemsize for n, shape in shapes.items())

    @property
    def common_dtype(self) -> np.dtype:
        """That of all tensors; float32, which holds any of them, where they are mixed."""
        found = set(self.dtypes.values())
        return found.pop() if len(found) == 1 else np.dtype(np.float32)


class Header(NamedTuple):
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors in the safetensors shards of a directory, with or without an index.

    Attributes:
      headers: name -> file, dtype and shape.
    """

    def __init__(self, directory: Path):
        """Raises UserError, naming the file, when one is missing or damaged."""
        self.headers = _headers(directory)

    def read(self, name: str) -> np.ndarray:
        path = self.headers[name].path
        try:
            # Opened for each tensor: the pages of a mapped file count as ours until it is closed.
            with safetensors.safe_open(path, framework="numpy") as shard:
                return shard.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again") from None


class SafetensorsCheckpoint(Published):
    """A directory of config.json and safetensors shards."""

    def __init__(self, directory: Path):
        """Raises UserError as `open_published` does."""
        path = directory / "config.json"
        text = read_bytes(path)
        self.config = read_hf_config(text, str(path))
        self.token_ids = _token_ids(json.loads(text))
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
                f"them; which of the two is the model's is not known"
            )


class GgufFile(Published):
    """A .gguf file; its weights are dequantised to float32."""

    def __init__(self, path: Path):
        """Raises UserError as `open_published` does."""
        from moi_jax.checkpoints.hf.gguf import open_gguf

        self._path = path
        self._file = open_gguf(path)
        self.config = read_hf_config(json.dumps(self._file.config_json), str(path))
        self.token_ids = _token_ids(self._file.config_json)
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


def open_published(source: Path) -> Published:
    """A published checkpoint, checked by its headers; no weights are read yet.

    Raises:
      UserError: naming the file, when one is missing or damaged, or when the tensors are not
        exactly those of the architecture in config.json.
    """
    if source.suffix == ".gguf" and source.is_file():
        return GgufFile(source)
    if source.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{source}: pickled weights can run code and are not read; use safetensors")
    if not source.is_dir():
        raise UserError(f"{source} is no directory and no .gguf file; name a published checkpoint")
    return SafetensorsCheckpoint(source)


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


def count_not_finite(tensor: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    flat = tensor.reshape(-1)
    block = 1 << 22  # the flags of a large tensor would take half of its own memory
    return sum(
        int(np.count_nonzero(~np.isfinite(flat[start : start + block])))
        for start in range(0, len(flat), block)
    )


def read_bytes(path: Path) -> bytes:
    """Raises UserError, naming the file, when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a directory with {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_names(source: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises UserError unless both name the same tensors."""
    found, expected = set(found), set(expected)
    for what, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{source} {what} {len(names)} tensors by its config: {shown}")


def _token_ids(config_json: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config_json.items() if key.endswith("_token_id")}


def _headers(directory: Path) -> dict[str, Header]:
    """Every tensor of a directory, each file opened once to see that it is whole."""
    index_path = directory / "model.safetensors.index.json"
    indexed = _weight_map(index_path) if index_path.is_file() else None
    if indexed is None:
        files = sorted(directory.glob("*.safetensors"))
    else:
        files = sorted({directory / name for name in indexed.values()})
    if not files:
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
        reason = "pickled weights can run code and are not read" if pickles else "none found"
        raise UserError(f"{directory} has no *.safetensors files ({reason})")
    headers: dict[str, Header] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is named by {index_path.name} but missing; copy it here")
        for name, header in _read_header(path).items():
            if name in headers:
                raise UserError(f"{name} is in {headers[name].path.name} and in {path}; keep one")
            headers[name] = header
    for name, file in (indexed or {}).items():
        if name not in headers or headers[name].path.name != file:
            raise UserError(f"{index_path} says {file} holds {name}, which is not there")
    return headers


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says."""
    try:
        weight_map: Any = json.loads(read_bytes(path))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}); copy it again") from None
    for file in pairs.values():
        if Path(file).name != file:
            raise UserError(f"{path} names {file!r}, which is outside its directory")
    return pairs


def _read_header(path: Path) -> dict[str, Header]:
    headers = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as shard:
            for name in list(shard.keys()):
                stored = shard.get_slice(name)
                headers[name] = (stored.get_dtype(), tuple(stored.get_shape()))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from None
    for name, (dtype, _) in headers.items():
        if dtype not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {dtype}; quantised weights are not supported, "
                f"import the full ones"
            )
    return {name: Header(path, DTYPES[dtype], shape) for name, (dtype, shape) in headers.items()}

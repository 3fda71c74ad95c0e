"""Reading the safetensors shards of a directory, a tensor at a time."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moi_jax.common.errors import UserError

# Dtypes by their names in safetensors headers; weights with any other are quantised.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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
        """Raises UserError if a file is missing or damaged; the message names it."""
        self.headers = _headers(directory)

    def read(self, name: str) -> np.ndarray:
        """One tensor; raises UserError if its file cannot be read."""
        path = self.headers[name].path
        try:
            # Opened for each tensor: pages of a mapped file count as our memory until it closes.
            with safetensors.safe_open(path, framework="numpy") as shard:
                return shard.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again") from None


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a directory with {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _headers(directory: Path) -> dict[str, Header]:
    """The headers of all tensors in a directory; opens each file to check that it is complete."""
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
    """Tensor name -> file name, from an index file."""
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

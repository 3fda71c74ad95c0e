"""Writing safetensors shards in the published layout, a tensor at a time.

A shard's header is written before its tensors come: the library's own writer needs all tensors of
a shard in memory.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from moi_jax.checkpoints.hf.safetensors_reader import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The tensors of each shard, in order; only a single larger tensor exceeds `limit` bytes.

    Args:
      sizes: name -> bytes.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.typing.DTypeLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    limit: int,
    progress: Callable[[int], None],
    stem: str = "model",
) -> None:
    """Writes the shards, and an index if there are several.

    Args:
      shapes: name -> shape of every tensor, in the order of the files.
      dtype: float32, float16 or bfloat16; tensors are cast to it.
      tensors: each tensor of `shapes` once, in any order.
      limit: the largest size of a shard, in bytes.
      progress: called with the number of bytes of each written tensor.
      stem: how the names of the files begin.
    """
    dtype = np.dtype(dtype)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, limit)
    places: dict[str, tuple[Path, int]] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        for name, offset in _write_header(directory / file, names, sizes, shapes, dtype).items():
            places[name] = (directory / file, offset)
    waiting = set(shapes)
    for name, tensor in tensors:
        waiting.remove(name)
        path, offset = places[name]
        assert tensor.shape == shapes[name], name
        with path.open("r+b") as shard:
            shard.seek(offset)
            shard.write(_bytes(tensor.astype(dtype, copy=False)))
        progress(sizes[name])
    assert not waiting, sorted(waiting)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: path.name for name, (path, _) in sorted(places.items())},
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_header(
    path: Path,
    names: list[str],
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
) -> dict[str, int]:
    """Writes the header of a shard; returns the offset of each tensor's bytes."""
    # transformers refuses files that do not name the library of their layout.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in names:
        starts[name], end = end, end + sizes[name]
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": shapes[name],
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def _bytes(tensor: np.ndarray) -> memoryview:
    """The bytes in row-major order, without a copy if they already are."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data

"""The sizes that the cache of a sampler may have, and what they take of the devices' memory."""

import math
from collections.abc import Sequence

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from rich import filesize

from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.decoding import LayerViews
from moi_jax.models.kv_cache import KV_AXES, value_shape
from moi_jax.models.parameters import parameter_specs
from moi_jax.parallel.placing import batch_shards, bucket, length_bucket, named_sharding

# The shortest cache; the others are as `length_bucket` says.
SHORTEST_CACHE = 128


class CacheMemory:
    """Sizes and memory of the caches of one sampler."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh | None,
        *,
        slots: int,
        context: int,
    ):
        """
        Args:
          dtype: of the computation.
          slots, context: as in `Sampler`.
        """
        self._config, self._dtype, self._mesh = config, jax.numpy.dtype(dtype), mesh
        self._slots, self._context = slots, context

    def length(self, tokens: int) -> int:
        """The length of a cache for so many tokens: one of a few, so few shapes are compiled."""
        return length_bucket(tokens, SHORTEST_CACHE, self._context)

    def largest(self, limits: Sequence[int] | None = None) -> tuple[int, int]:
        """Rows and length of the largest cache.

        Args:
          limits: the most tokens of each request of a run; None is any run.
        """
        if limits is None:
            return self._slots, self._context
        rows = bucket(len(limits), batch_shards(self._mesh), self._slots)
        return rows, self.length(max(limits, default=1))

    def bytes(self, rows: int, length: int) -> int:
        """Bytes of a cache of so many rows of this length, on each device."""
        layer = self._elements(value_shape(self._config, rows, length), KV_AXES)
        return 2 * self._config.num_layers * layer * self._dtype.itemsize

    def describe(self, parameters: Tree | LayerViews, limits: Sequence[int] | None = None) -> str:
        """What a run allocates in words, for a message before that; `limits` as in `largest`."""
        rows, length = self.largest(limits)
        devices = 1 if self._mesh is None else self._mesh.size
        size = filesize.decimal(self.bytes(rows, length))
        most = "at most " if limits is None else ""
        each = f" on each of {devices} devices" if devices > 1 else ""
        told = f"cache of {rows} x {length:,} tokens: {most}{size}{each}"
        if more := self._copy_bytes(parameters):
            told += f", and {filesize.decimal(more)} for the weights once more"
        return told

    def check(self, rows: int, length: int, parameters: Tree | LayerViews) -> None:
        """Raises UserError when cache and layers do not fit the free memory of a device."""
        # While a cache grows, the next shorter one is still there.
        lengths = {self.length(length * quarters // 4) for quarters in (1, 2, 3)}
        shorter = max(lengths - {length}, default=0)
        cache = self.bytes(rows, length) + self.bytes(rows, shorter)
        copy = self._copy_bytes(parameters)
        devices = self._mesh.local_devices if self._mesh is not None else jax.local_devices()[:1]
        for device in devices:
            memory = device.memory_stats() or {}
            if {"bytes_limit", "bytes_in_use"} <= memory.keys():
                free = memory["bytes_limit"] - memory["bytes_in_use"]
                if cache + copy > free:
                    weights = f", and the weights once more {copy / 2**30:.1f} GiB" if copy else ""
                    raise UserError(
                        f"a KV cache of {rows} x {length:,} tokens takes up to "
                        f"{cache / 2**30:.1f} GiB while it grows{weights}; {device} has "
                        f"{free / 2**30:.1f} GiB free. Lower slots, context or max_new_tokens"
                    )

    def _copy_bytes(self, parameters: Tree | LayerViews) -> int:
        """Bytes of the second copy that `view_layers` makes on each device; 0 for `LayerViews`.

        It copies all layers, and outside them what has another dtype than the computation.
        """
        if isinstance(parameters, LayerViews):
            return 0
        stored = flatten_dict(parameters, sep=".")
        copied = [
            p
            for path, p in parameter_specs(self._config).items()
            if path.startswith("layers.") or stored[path].dtype != self._dtype
        ]
        return sum(
            self._elements(p.shape, p.axes) * (p.own_dtype or self._dtype).itemsize for p in copied
        )

    def _elements(self, shape: tuple[int, ...], names: Sequence[str | None]) -> int:
        """Elements on each device of an array with these logical axes."""
        if self._mesh is None:
            return math.prod(shape)
        return math.prod(named_sharding(names, shape, self._mesh).shard_shape(shape))

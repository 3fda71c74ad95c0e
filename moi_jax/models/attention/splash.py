"""Attention on a TPU by jax's splash kernel: no S x S array, blocks that no token sees are skipped.

The kernel is the one of jax itself (jax.experimental.pallas.ops.tpu.splash_attention), so it needs
no package besides jax. It computes grouped-query attention without repeating the KV heads, and its
backward pass is one kernel for all three gradients.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import Mesh

from moi_jax.config import SplashBlocks
from moi_jax.models.attention.sharded import (
    attend_on_mesh,
    in_order,
    pad_rows,
    part_of_device,
)
from moi_jax.parallel.context import context_order

LANES = 128  # the kernel's rows and blocks are multiples of it


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """The backend `splash`, see `AttentionFn`.

    Attributes:
      blocks: the largest blocks; a shorter row has smaller ones.
      mesh: the mesh over which rows, heads and queries are split; None means one device.
      interpret: run the kernel as plain XLA operations, on any platform. For tests.
    """

    blocks: SplashBlocks
    mesh: Mesh | None = None
    interpret: bool = False

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        """Computes attention as `AttentionFn` says.

        The tokens of a row must be in order, or in that of `context_order` on a context axis.
        """
        del positions  # they rise within a segment, like the places in the row
        return attend_on_mesh(self._local, self.mesh, query, key, value, segment_ids)

    def _local(
        self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Computes [B, T, H, N] from query [B, T, H, N], key and value [B, S, K, N]."""
        tokens, shards = query.shape[1], key.shape[1] // query.shape[1]
        # The kernel does not scale. Scaling in float32 rounds once, as a cast does.
        wide = query.astype(jnp.promote_types(query.dtype, jnp.float32))
        query = (wide / math.sqrt(query.shape[-1])).astype(query.dtype)
        kernel = self._kernel(context_order(key.shape[1], shards), query.shape[2], shards)
        query_ids = part_of_device(segment_ids, shards, axis=1)
        key, value, segment_ids = (in_order(x, shards) for x in (key, value, segment_ids))
        query, query_ids = pad_rows(LANES, query, query_ids)
        key, value, segment_ids = pad_rows(LANES, key, value, segment_ids)
        query, key, value = (heads.swapaxes(1, 2) for heads in (query, key, value))
        ids = kernels.SegmentIds(q=query_ids, kv=segment_ids)
        output: Any = jax.vmap(kernel)(query, key, value, ids)
        return output.swapaxes(1, 2)[:, :tokens]

    def _kernel(self, order: np.ndarray, heads: int, shards: int) -> Callable[..., Any]:
        """Returns this device's kernel: query [H, T, N], key and value [K, S, N] -> [H, T, N].

        Args:
          order: int[S], which token each query is; a device holds the queries of one of the shards.
        """
        queries = order.reshape(shards, -1)
        # What is added behind a device's queries gets the place of the last one; it is not used.
        queries = np.pad(queries, ((0, 0), (0, -queries.shape[1] % LANES)), mode="edge")
        keys = -(-len(order) // LANES) * LANES
        mask = kernels.CausalMask((queries.size, keys))
        mask.q_sequence = queries.reshape(-1).astype(np.int32)
        kernel = kernels.make_splash_mha(
            kernels.MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(self.blocks, queries.shape[1], keys),
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name="context",
            interpret=self.interpret,
        )
        # Its arrays say which blocks of scores to compute [heads, blocks of queries, blocks of
        # keys], and which token each query is.
        return jax.tree.map(lambda x: part_of_device(x, shards, axis=min(x.ndim - 1, 1)), kernel)


def _block_sizes(blocks: SplashBlocks, queries: int, keys: int) -> kernels.BlockSizes:
    """Returns the blocks for rows of these lengths, which are multiples of 128."""
    kv, kv_dkv = _block(blocks.kv, keys), _block(blocks.kv_dkv, keys)
    return kernels.BlockSizes(
        block_q=_block(blocks.q, queries),
        block_kv=kv,
        block_kv_compute=_block(blocks.kv_compute, kv),
        block_q_dkv=_block(blocks.q_dkv, queries),
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=_block(blocks.kv_dkv_compute, kv_dkv),
        use_fused_bwd_kernel=True,
    )


def _block(largest: int, length: int) -> int:
    """Returns the largest multiple of 128 that divides the length and is not above `largest`."""
    sizes = range(LANES, min(largest, length) + 1, LANES)
    return max(size for size in sizes if length % size == 0)

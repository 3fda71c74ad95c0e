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
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import Mesh

from moi_jax.config import SplashBlocks
from moi_jax.models.attention.sharded import attend_on_mesh, pad_rows

LANES = 128  # the kernel's rows and blocks are multiples of it


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """The backend `splash`, see `AttentionFn`.

    Attributes:
      blocks: the largest blocks; a shorter row has smaller ones.
      mesh: the mesh over which rows and heads are split; None means one device.
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
        """Computes attention as `AttentionFn` says. The tokens of a row must be in order."""
        del positions  # they rise within a segment, like the places in the row
        return attend_on_mesh(self._local, self.mesh, query, key, value, segment_ids)

    def _local(
        self, query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Computes [B, S, H, N] from query [B, S, H, N], key and value [B, S, K, N]."""
        length = query.shape[1]
        # The kernel does not scale. Scaling in float32 rounds once, as a cast does.
        wide = query.astype(jnp.promote_types(query.dtype, jnp.float32))
        query = (wide / math.sqrt(query.shape[-1])).astype(query.dtype)
        query, key, value, segment_ids = pad_rows(LANES, query, key, value, segment_ids)
        kernel = self._kernel(query.shape[1], query.shape[2])
        query, key, value = (heads.swapaxes(1, 2) for heads in (query, key, value))
        ids = kernels.SegmentIds(q=segment_ids, kv=segment_ids)
        output: Any = jax.vmap(kernel)(query, key, value, ids)
        return output.swapaxes(1, 2)[:, :length]

    def _kernel(self, length: int, heads: int) -> Callable[..., Any]:
        """Returns the kernel of one row: query [H, S, N], key and value [K, S, N] -> [H, S, N]."""
        mask = kernels.CausalMask((length, length))
        return kernels.make_splash_mha(
            kernels.MultiHeadMask([mask] * heads),
            block_sizes=_block_sizes(self.blocks, length),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="context",
            interpret=self.interpret,
        )


def _block_sizes(blocks: SplashBlocks, length: int) -> kernels.BlockSizes:
    """Returns the blocks for rows of a length that is a multiple of 128."""
    kv, kv_dkv = _block(blocks.kv, length), _block(blocks.kv_dkv, length)
    return kernels.BlockSizes(
        block_q=_block(blocks.q, length),
        block_kv=kv,
        block_kv_compute=_block(blocks.kv_compute, kv),
        block_q_dkv=_block(blocks.q_dkv, length),
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=_block(blocks.kv_dkv_compute, kv_dkv),
        use_fused_bwd_kernel=True,
    )


def _block(largest: int, length: int) -> int:
    """Returns the largest multiple of 128 that divides the length and is not above `largest`."""
    sizes = range(LANES, min(largest, length) + 1, LANES)
    return max(size for size in sizes if length % size == 0)

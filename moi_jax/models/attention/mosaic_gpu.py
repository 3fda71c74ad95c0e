"""Attention on a Hopper GPU (H100, H200) by tokamax's Mosaic kernels: no S x S array.

These are the kernels of tokamax's PallasMosaicGpuFlashAttention with Mask(k_start, is_causal=True):
a token sees the keys from the first one of its segment up to its own. They are called directly, not
through that class. The tiles are then those named here and not what an autotuning cache holds, what
the backward pass keeps has a name for rematerialisation, and a machine without a GPU can lower both
passes. The kernels are private to tokamax, so setup.cfg pins the version.
"""

import dataclasses
import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as forward
from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as backward

from moi_jax.models.attention.sharded import attend_on_mesh, pad_rows, segment_starts

# tokamax's own choice for heads of up to 128. The sums, and so the last bits, depend on them.
FORWARD_TILES = forward.Config(block_q=64, block_kv=128, num_stages=2)
BACKWARD_TILES = backward.Config(
    block_q_dq=64, block_kv_dq=64, block_q_dkv=64, block_kv_dkv=64, num_stages=2, compute_wgs=2
)
MULTIPLE = 128  # rows of whole tiles: two warpgroups of 64 queries, or one tile of 128 keys


@dataclasses.dataclass(frozen=True)
class MosaicGpuAttention:
    """The backend `mosaic_gpu`, see `AttentionFn`.

    Attributes:
      mesh: the mesh over which rows and heads are split; None means one device.
    """

    mesh: Mesh | None = None

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        """Computes attention as `AttentionFn` says, in bfloat16.

        The tokens of a row must be in order, and a segment must be one run of equal ids.
        """
        del positions  # they rise within a segment, like the places in the row
        return attend_on_mesh(_attend_rows, self.mesh, query, key, value, segment_ids)


def _attend_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Computes [B, S, H, N] from query [B, S, H, N], key and value [B, S, K, N]."""
    length = query.shape[1]
    query, key, value, segment_ids = pad_rows(MULTIPLE, query, key, value, segment_ids)
    return _attend(query, key, value, segment_starts(segment_ids))[:, :length]


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, starts: jax.Array) -> jax.Array:
    return _attend_forward(query, key, value, starts)[0]


# output, maxima and sums of the softmax [B, H, S], query, key, value, starts
Residuals = tuple[jax.Array, ...]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, starts: jax.Array
) -> tuple[jax.Array, Residuals]:
    def row(query: jax.Array, key: jax.Array, value: jax.Array, starts: jax.Array) -> tuple:
        return forward.flash_attention_kernel(
            query,
            key,
            value,
            bias=None,
            mask=None,
            k_start=starts[None],
            k_end=None,
            is_causal=True,
            logits_soft_cap=None,
            logits_scale=1 / math.sqrt(query.shape[-1]),
            out_dtype=query.dtype,
            normalize_output=True,
            return_residuals=True,
            use_stable_softmax=True,
            rescale_threshold=1.0,
            config=FORWARD_TILES,
        )

    output, (largest, total) = jax.vmap(row)(query, key, value, starts)
    kept = (checkpoint_name(array, "context") for array in (output, largest, total))
    output, largest, total = kept
    return output, (output, largest, total, query, key, value, starts)


def _attend_backward(residuals: Residuals, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    def row(residuals: Residuals, gradient: jax.Array) -> tuple:
        output, largest, total, query, key, value, starts = residuals
        return backward.flash_attention_vjp_kernel(
            query,
            key,
            value,
            (largest, total),
            output,
            gradient,
            bias=None,
            mask=None,
            k_start=starts[None],
            k_end=None,
            logits_scale=1 / math.sqrt(query.shape[-1]),
            logits_soft_cap=None,
            is_causal=True,
            ds_dtype=None,
            config=BACKWARD_TILES,
        )[:3]

    return *jax.vmap(row)(residuals, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)

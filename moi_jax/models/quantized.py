"""Matrices as codes of a few bits: int8 by output channel, and the 4-bit NormalFloat of QLoRA.

* int8: symmetric, one absmax for each output, the vector-wise quantisation of weights in LLM.int8()
  (Dettmers et al. 2022, arXiv 2208.07339, section 3.1).
* nf4: 4-bit NormalFloat in blocks of 64 inputs with an absmax each (Dettmers et al. 2023, QLoRA,
  arXiv 2305.14314, section 3; the levels are those of its appendix E). bitsandbytes flattens a
  weight [outputs, inputs], so its blocks are the same where 64 divides the inputs.

The letters: I inputs (the contracted axes as one), and "..." the outputs.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Scheme = Literal["int8", "nf4"]

BLOCK = 64  # inputs that share an absmax in nf4
LARGEST = 127  # of the codes of int8
# fmt: off
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)
# fmt: on
# A value between two levels is nearer to the upper one above their midpoint. At the midpoint it is
# the lower one, as in bitsandbytes.
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2


def quantize(scheme: Scheme, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises a matrix [I, ...]. NaN in a block makes its absmax NaN.

    Args:
      scheme: for nf4, 64 must divide I.

    Returns:
      The codes, int8[I, ...] or uint8[I / 2, ...] with two values a byte, the first one in the high
      bits; and the absmax, float32[1, ...] or float32[I / 64, ...].
    """
    wide = matrix.astype(jnp.float32)
    inputs, *outputs = wide.shape
    blocks = wide.reshape(1 if scheme == "int8" else inputs // BLOCK, -1, *outputs)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    divisor = jnp.where(absmax == 0, 1, absmax)[:, None]
    if scheme == "int8":
        codes = jnp.round(blocks * LARGEST / divisor).astype(jnp.int8)
        return codes.reshape(wide.shape), absmax
    scaled = (blocks / divisor).reshape(wide.shape)
    # One comparison for each midpoint, so that no array has an axis of levels.
    codes = sum((scaled > midpoint).astype(jnp.uint8) for midpoint in MIDPOINTS)
    pairs = jnp.asarray(codes).reshape(inputs // 2, 2, *outputs)
    return pairs[:, 0] << 4 | pairs[:, 1], absmax


def dequantize(scheme: Scheme, codes: jax.Array, absmax: jax.Array) -> jax.Array:
    """Returns the values float32[I, ...] of the codes and the absmax of `quantize`."""
    outputs = codes.shape[1:]
    if scheme == "int8":
        return codes.astype(jnp.float32) * absmax * np.float32(1 / LARGEST)
    pairs = jnp.stack([codes >> 4, codes & 15], axis=1)
    blocks = _levels(pairs.reshape(absmax.shape[0], -1, *outputs)) * absmax[:, None]
    return blocks.reshape(-1, *outputs)


def _levels(codes: jax.Array) -> jax.Array:
    """Looks the levels up by selections, a bit at a time: TPUs and CPUs gather slowly."""
    chosen: list[jax.Array | np.float32] = list(LEVELS)
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        chosen = [jnp.where(is_set, b, a) for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
    return jnp.asarray(chosen[0])


def relative_error(scheme: Scheme, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns float32[] twice: the RMS of the error over the RMS of the matrix, and its maximum."""
    wide = matrix.astype(jnp.float32)
    error = dequantize(scheme, *quantize(scheme, wide)) - wide
    rms = jnp.sqrt(jnp.sum(error**2) / jnp.maximum(jnp.sum(wide**2), jnp.finfo(jnp.float32).tiny))
    return rms, jnp.max(jnp.abs(error))

"""The product with a kernel, whose gradient is taken in the order that compilers do well."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moi_jax.models.quantized import Scheme, dequantize


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(contracted: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sums x [..., inputs] times kernel [inputs, outputs] over the inputs, `contracted` axes.

    The gradient of the kernel is x^T g. jax would take (g^T x)^T, for which XLA on CPUs computes g
    transposed: several reads far apart for each value (benchmarks/torch_peer.py shows it).

    Returns:
      [..., outputs], in the dtype of both arguments.
    """
    return jnp.tensordot(x, kernel, contracted)


def _forward(
    contracted: int, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(contracted, x, kernel), (x, kernel)


def _backward(
    contracted: int, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    rows = list(range(x.ndim - contracted))
    outputs = list(range(len(rows), cotangent.ndim)), list(range(contracted, kernel.ndim))
    return jnp.tensordot(cotangent, kernel, outputs), jnp.tensordot(x, cotangent, (rows, rows))


product.defvjp(_forward, _backward)


def cast_in_place(kernel: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts the kernel of one layer, and keeps XLA from casting those of all layers beforehand.

    XLA would move the cast out of the scan over layers, and hold the copy that long. It does not
    move the rounding, which changes no bit: the cast rounds the same way.
    """
    if kernel.dtype == dtype:
        return kernel
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(kernel, bits.nexp, bits.nmant).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def quantized_product(
    scheme: Scheme, contracted: int, x: jax.Array, codes: jax.Array, absmax: jax.Array
) -> jax.Array:
    """Does the same as `product` with a frozen kernel that is kept as codes and their absmax.

    The backward pass keeps the codes, not the kernel, and dequantises it once more. It has no
    gradient of the kernel.

    Args:
      codes, absmax: see models/quantized.py; of all inputs as one axis.
    """
    return product(contracted, x, _kernel(scheme, contracted, x, codes, absmax))


def _kernel(
    scheme: Scheme, contracted: int, x: jax.Array, codes: jax.Array, absmax: jax.Array
) -> jax.Array:
    kernel = dequantize(scheme, codes, absmax)
    kernel = kernel.reshape(*x.shape[x.ndim - contracted :], *codes.shape[1:])
    return cast_in_place(kernel, x.dtype)


def _quantized_forward(
    scheme: Scheme, contracted: int, x: jax.Array, codes: jax.Array, absmax: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Of x the backward pass needs the shape alone, which an empty array carries.
    shape = jnp.empty((0, *x.shape[x.ndim - contracted :]), x.dtype)
    return quantized_product(scheme, contracted, x, codes, absmax), (shape, codes, absmax)


def _quantized_backward(
    scheme: Scheme, contracted: int, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    shape, codes, absmax = residuals
    kernel = _kernel(scheme, contracted, shape, codes, absmax)
    outputs = kernel.ndim - contracted
    axes = (
        list(range(cotangent.ndim - outputs, cotangent.ndim)),
        list(range(contracted, kernel.ndim)),
    )
    return jnp.tensordot(cotangent, kernel, axes), None, None


quantized_product.defvjp(_quantized_forward, _quantized_backward)

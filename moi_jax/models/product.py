"""The product with a kernel, whose gradient is taken in the order that compilers do well."""

from functools import partial

import jax
import jax.numpy as jnp


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

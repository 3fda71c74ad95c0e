"""Parameters as they are declared, and the matrix of the decoder, with its adapter.

Every matrix goes through the one `Linear`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moi_jax.models.product import cast_in_place, product, quantized_product
from moi_jax.models.quantized import Scheme, quantize

# Logical axis -> size, in the order of the array. None is never split, see parallel/axes.py.
Dims = dict[str | None, int]


def parameter(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    decays: bool = False,
    trainable: bool = True,
    contracted: int = 0,
    adapter: bool = False,
    keeps_dtype: bool = False,
) -> nnx.Param:
    """Declares a parameter, with its metadata.

    Args:
      axes: one logical axis for each dimension. flax's `out_sharding` does not fit here: it takes
        mesh axes, and parallel/axes.py decides which mesh axes a logical axis is split over.
      decays: whether weight decay applies. It does for matrices, not for norms and biases.
      trainable: whether it is trained. A frozen parameter has no gradient and no optimizer
        state.
      contracted: of a matrix, the number of its axes that a product sums over.
      adapter: whether it is a part of an adapter. The others are then frozen.
      keeps_dtype: whether its dtype is its own, whatever that of the other parameters is.
    """
    return nnx.Param(
        value,
        logical_axes=axes,
        decays=decays,
        trainable=trainable,
        contracted=contracted,
        adapter=adapter,
        keeps_dtype=keeps_dtype,
    )


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype: DTypeLike) -> jax.Array:
    """Draws in float32, so that the values do not depend on the dtype of the result."""
    return (stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """x @ kernel + bias over one or more axes: every matrix of the decoder, also the head."""

    def __init__(
        self,
        inputs: Dims,
        outputs: Dims,
        *,
        stddev: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        shape = (*inputs.values(), *outputs.values())
        axes = (*inputs, *outputs)
        kernel = normal(rngs, shape, stddev, dtype)
        self.kernel = parameter(kernel, axes, decays=True, contracted=len(inputs))
        zeros = jnp.zeros(tuple(outputs.values()), dtype)
        self.bias = parameter(zeros, tuple(outputs)) if bias else None
        self.contracted = len(inputs)
        # Not declared to be data, an attribute that is None at first could not become a parameter.
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.scale = 0.0
        self.codes: nnx.Param | None = nnx.data(None)
        self.absmax: nnx.Param | None = nnx.data(None)
        self.scheme: Scheme = "int8"

    def add_adapter(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Adds the matrices A [inputs, r] and B [r, outputs], float32 or wider.

        B is zero, so that the model computes what it did; 0.0 may take the place of -0.0. A is
        uniform within 1 / sqrt(inputs), as in peft and in loralib (kaiming, a = sqrt 5).
        """
        split, shape = self.contracted, self.kernel.shape
        axes = self.kernel.get_metadata("logical_axes")
        dtype = jnp.promote_types(self.kernel.dtype, jnp.float32)
        bound = math.prod(shape[:split]) ** -0.5
        drawn = jax.random.uniform(
            rngs.params(), (*shape[:split], rank), jnp.float32, -bound, bound
        )
        zeros = jnp.zeros((rank, *shape[split:]), dtype)
        declare = partial(parameter, decays=True, adapter=True)
        self.lora_a = declare(drawn.astype(dtype), (*axes[:split], None), contracted=split)
        self.lora_b = declare(zeros, (None, *axes[split:]), contracted=1)
        self.scale = scale

    def quantize(self, scheme: Scheme) -> None:
        """Puts codes and their absmax in the place of the kernel, see models/quantized.py.

        Its input axes become one, which is split like the first of them.
        """
        split, kernel = self.contracted, self.kernel
        axes = kernel.get_metadata("logical_axes")
        codes, absmax = quantize(scheme, kernel[...].reshape(-1, *kernel.shape[split:]))
        blocks = axes[0] if scheme == "nf4" else None
        declare = partial(parameter, trainable=False, keeps_dtype=True)
        self.codes = declare(codes, (axes[0], *axes[split:]))
        self.absmax = declare(absmax, (blocks, *axes[split:]))
        self.scheme = scheme
        del self.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., inputs] to [..., outputs] in x's dtype."""
        if self.codes is not None and self.absmax is not None:
            codes, absmax = self.codes[...], self.absmax[...]
            y = quantized_product(self.scheme, self.contracted, x, codes, absmax)
        else:
            y = product(self.contracted, x, cast_in_place(self.kernel[...], x.dtype))
        if self.lora_a is not None and self.lora_b is not None:
            narrow = product(self.contracted, x, cast_in_place(self.lora_a[...], x.dtype))
            y += product(1, self.scale * narrow, cast_in_place(self.lora_b[...], x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

"""From the parameters of a base to those that a model with quantised matrices has."""

import logging
from collections.abc import Iterable
from functools import partial

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moi_jax.common.progress import count_bar
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import base_of, parameter_shardings, parameter_specs
from moi_jax.models.quantized import Scheme, dequantize, quantize, relative_error

log = logging.getLogger(__name__)


def quantized_base(
    config: ModelConfig,
    base: Iterable[tuple[str, jax.Array]],
    dtype: DTypeLike,
    mesh: Mesh | None,
) -> Tree:
    """Quantises the matrices of the layers, one stack after the other; each is then deleted.

    The values count as bfloat16, as they do in the fingerprint of a base, so every copy of a base
    has the same codes. The error of each stack is logged.

    Args:
      config: with adapters beside a quantised base.
      base: (dotted path, array) of every parameter of `config.base`. Where it makes them one at a
        time, the base is never whole on the devices.
      dtype: of the parameters that are not quantised.

    Returns:
      The parameters of `config` but for its adapters.
    """
    assert config.adapter is not None
    scheme = config.adapter.quantization
    assert scheme is not None
    specs = parameter_specs(config.base)
    flat: dict[str, jax.Array] = {}
    shardings: dict = {}
    if mesh is not None:
        tree = base_of(config, parameter_shardings(config, mesh))
        shardings = traverse_util.flatten_dict(tree, sep=".")
    with count_bar("reading and quantising the base", len(specs)) as progress:
        for path, array in base:
            progress(1)
            if not (path.startswith("layers.") and specs[path].contracted):
                flat[path] = array.astype(dtype)
                continue
            module = path.removesuffix("kernel")
            names = module + "codes", module + "absmax"
            split = tuple(shardings.get(name) for name in names)
            program = jax.jit(_quantized, static_argnums=(0, 1), out_shardings=(*split, None))
            *quantized, errors = program(scheme, specs[path].contracted, array)
            flat |= zip(names, quantized, strict=True)
            _log(scheme, path, errors)
            array.delete()
    return traverse_util.unflatten_dict(flat, sep=".")


def _quantized(
    scheme: Scheme, contracted: int, kernel: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Codes, absmax and errors of [L, inputs, outputs], a layer at a time."""

    def of_layer(layer: jax.Array) -> tuple:
        rounded = jax.lax.reduce_precision(layer, exponent_bits=8, mantissa_bits=7)
        matrix = rounded.reshape(-1, *layer.shape[contracted:])
        return (*quantize(scheme, matrix), relative_error(scheme, matrix))

    return jax.lax.map(of_layer, kernel)


def quantized_once(scheme: Scheme, matrix: np.ndarray) -> np.ndarray:
    """Returns the values float32[I, ...] that a matrix of a base has after it is quantised."""
    return np.asarray(_there_and_back(scheme, matrix))


@partial(jax.jit, static_argnums=0)
def _there_and_back(scheme: Scheme, matrix: jax.Array) -> jax.Array:
    rounded = jax.lax.reduce_precision(matrix, exponent_bits=8, mantissa_bits=7)
    return dequantize(scheme, *quantize(scheme, rounded))


def _log(scheme: str, path: str, errors: tuple[jax.Array, jax.Array]) -> None:
    relative, largest = jax.device_get(errors)
    worst = int(relative.argmax())
    log.info(
        f"{scheme} {path}: relative RMS error {relative.mean():.3%}, the worst in layer {worst} "
        f"({relative[worst]:.3%}); largest error {largest.max():.3g}"
    )

"""Every parameter, declared once: path, shape, logical axes, initialiser.

The abstract tree, the random initialisation, the shardings and the weight-decay mask all
derive from `declare`. Trees are nested dicts; layers are stacked along a leading L axis.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax.models.config import ModelConfig
from moi_jax.parallel.placing import named_sharding

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, see axes.py
    init: str  # normal, zeros or ones

    @property
    def decays(self) -> bool:
        """Weight decay acts on matrices; norms and biases are left alone."""
        return self.init == "normal"


def declare(config: ModelConfig) -> dict[str, Parameter]:
    """Dotted path -> declaration, for every parameter of the decoder."""
    c = config
    d, h, k, n, f, v = (
        c.hidden_size,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.mlp_width,
        c.vocab_size,
    )
    layer = {
        "attention_norm": Parameter((d,), (None,), "ones"),
        "query": Parameter((d, h, n), ("embed", "heads", None), "normal"),
        "key": Parameter((d, k, n), ("embed", "kv_heads", None), "normal"),
        "value": Parameter((d, k, n), ("embed", "kv_heads", None), "normal"),
        "out": Parameter((h, n, d), ("heads", None, "embed"), "normal"),
        "mlp_norm": Parameter((d,), (None,), "ones"),
        "gate": Parameter((d, f), ("embed", "mlp"), "normal"),
        "up": Parameter((d, f), ("embed", "mlp"), "normal"),
        "down": Parameter((f, d), ("mlp", "embed"), "normal"),
    }
    if c.qkv_bias:
        layer["query_bias"] = Parameter((h, n), ("heads", None), "zeros")
        layer["key_bias"] = Parameter((k, n), ("kv_heads", None), "zeros")
        layer["value_bias"] = Parameter((k, n), ("kv_heads", None), "zeros")
    if c.out_bias:
        layer["out_bias"] = Parameter((d,), (None,), "zeros")
    if c.qk_norm:
        layer["query_norm"] = Parameter((n,), (None,), "ones")
        layer["key_norm"] = Parameter((n,), (None,), "ones")
    stacked = {
        f"layers.{name}": Parameter((c.num_layers, *p.shape), (None, *p.axes), p.init)
        for name, p in layer.items()
    }
    head = {} if c.tied_head else {"head": Parameter((d, v), (None, "head_vocab"), "normal")}
    return {
        "embedding": Parameter((v, d), ("vocab", "embed"), "normal"),
        **stacked,
        "final_norm": Parameter((d,), (None,), "ones"),
        **head,
    }


def map_parameters(config: ModelConfig, make: Callable[[str, Parameter], Any]) -> Tree:
    """The nested tree of `make(path, parameter)` over every declared parameter."""
    tree: Tree = {}
    for path, parameter in declare(config).items():
        *folders, name = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = make(path, parameter)
    return tree


def abstract_parameters(config: ModelConfig, dtype: jax.typing.DTypeLike) -> Tree:
    """The tree of `jax.ShapeDtypeStruct`s."""
    return map_parameters(config, lambda _, p: jax.ShapeDtypeStruct(p.shape, dtype))


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """The tree of shardings of the parameters, from their logical axes."""
    return map_parameters(config, lambda _, p: named_sharding(p.axes, p.shape, mesh))


def random_parameters(
    config: ModelConfig, seed: int, dtype: jax.typing.DTypeLike, mesh: Mesh
) -> Tree:
    """Random parameters, made where they will lie; the values do not depend on the mesh."""
    shardings = parameter_shardings(config, mesh)
    make = jax.jit(lambda key: init_parameters(config, key, dtype), out_shardings=shardings)
    return make(jax.random.key(seed))


def init_parameters(config: ModelConfig, key: jax.Array, dtype: jax.typing.DTypeLike) -> Tree:
    """Random parameters: normal(initializer_range), zero biases, unit norms.

    Each parameter has a key of its own, folded from its path, so that adding one leaves the
    others as they are; the values do not depend on the mesh.
    """

    def make(path: str, parameter: Parameter) -> jax.Array:
        if parameter.init == "zeros":
            return jnp.zeros(parameter.shape, dtype)
        if parameter.init == "ones":
            return jnp.ones(parameter.shape, dtype)
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        draw = jax.random.normal(own_key, parameter.shape, jnp.float32)
        return (config.initializer_range * draw).astype(dtype)

    return map_parameters(config, make)

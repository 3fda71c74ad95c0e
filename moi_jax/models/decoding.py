"""Inference with a cache: whole prompts first, then a few tokens a step, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike, DTypeLike

from moi_jax.models.attention.cached import cached_attention
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Decoder, DecoderLayer, KeysAndValues, Tree
from moi_jax.models.kv_cache import Cache, write_keys, write_values
from moi_jax.models.parameters import Parameter, abstract_parameters, parameter_specs
from moi_jax.models.rotary import Rotary, position_angles
from moi_jax.parallel.axes import constrain
from moi_jax.parallel.context import (
    context_order,
    context_places,
    context_shards,
    padded_length,
)


class LayerViews(NamedTuple):
    """The parameters of a model for decoding: one tree for each layer instead of stacked layers.

    For every token a scan would copy each layer's weights out of the stack. This costs more than
    the work of the layer. So the layers are unstacked once, and cast to the compute dtype.

    Attributes:
      outer: the parameters outside the layers, cast.
      layers: one tree for each layer, with the names of `DecoderLayer`, cast.
    """

    outer: Tree
    layers: tuple[Tree, ...]

    def bind(self, bind: Bind, parameters: Tree) -> tuple[Decoder, list[DecoderLayer]]:
        """Returns the model with these parameters, and the list of its layers.

        Args:
          bind: parameters -> model.
          parameters: a tree of the model's parameters. Only its names are used.
        """
        model = bind({**parameters, **self.outer})
        graph = nnx.graphdef(model.layers)
        return model, [nnx.merge(graph, layer) for layer in self.layers]


def view_layers(config: ModelConfig, parameters: Tree, dtype: DTypeLike) -> LayerViews:
    """Unstacks the layers of a model and casts all its parameters but codes to `dtype`."""
    specs = _layer_specs(config)
    parts = {
        path: _unstack(stacked, specs[path].axes[1:], specs[path].own_dtype or dtype)
        for path, stacked in flatten_dict(parameters["layers"], sep=".").items()
    }
    outer = {name: tree for name, tree in parameters.items() if name != "layers"}
    return LayerViews(jax.tree.map(lambda x: x.astype(dtype), outer), _by_layer(config, parts))


def take_layers(config: ModelConfig, parameters: Tree, dtype: DTypeLike) -> LayerViews:
    """Does the same with arrays that nobody else needs: it deletes each as soon as it is unstacked.

    So the parameters are in memory once, with one stacked parameter more for a moment.
    """
    specs, parts = _layer_specs(config), {}
    unstack = jax.jit(_unstack, static_argnums=(1, 2))
    for path, stacked in flatten_dict(parameters["layers"], sep=".").items():
        kept, axes = specs[path].own_dtype or dtype, specs[path].axes[1:]
        parts[path] = jax.block_until_ready(unstack(stacked, axes, kept))
        stacked.delete()
    outer = {name: tree for name, tree in parameters.items() if name != "layers"}
    # An array that has the dtype already is not copied.
    return LayerViews(jax.tree.map(lambda x: x.astype(dtype), outer), _by_layer(config, parts))


def _layer_specs(config: ModelConfig) -> dict[str, Parameter]:
    """Dotted path below `layers` -> the stacked parameter."""
    return {
        path.removeprefix("layers."): spec
        for path, spec in parameter_specs(config).items()
        if path.startswith("layers.")
    }


def _unstack(
    stacked: jax.Array, axes: tuple[str | None, ...], dtype: DTypeLike
) -> tuple[jax.Array, ...]:
    return tuple(constrain(layer.astype(dtype), *axes) for layer in stacked)


def _by_layer(config: ModelConfig, parts: Mapping[str, Sequence[jax.Array]]) -> tuple[Tree, ...]:
    return tuple(
        unflatten_dict({path: layers[number] for path, layers in parts.items()}, sep=".")
        for number in range(config.num_layers)
    )


class Prompts(NamedTuple):
    """Prompts on their way through the layers.

    Attributes:
      x: [B, S, D].
      angles: of all layers.
      positions: int32[B, S].
    """

    x: jax.Array
    angles: Rotary
    positions: jax.Array


class LayerPrograms:
    """The programs that run prompts through a model a layer at a time.

    All layers share one program. A program of all layers would take long to compile for each shape
    of prompts, and a scan over them needs stacked layers, which are the same weights once more.
    """

    def __init__(self, bind: Bind, config: ModelConfig):
        """
        Args:
          bind: parameters -> model.
        """
        self._bind, self.config = bind, config
        self.names = abstract_parameters(config, jnp.float32)
        self.begin = jax.jit(self._begin)
        self.layer = jax.jit(self._layer, static_argnums=4)
        self.end = jax.jit(self._end)

    def _begin(self, outer: Tree, tokens: jax.Array, lengths: jax.Array) -> Prompts:
        model = self._bind({**self.names, **outer})
        given, shards = tokens.shape[1], _shards()
        length = padded_length(given, shards)
        order = context_order(length, shards)
        tokens = jnp.pad(tokens, ((0, 0), (0, length - given)))[:, order]
        positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32), tokens.shape)
        alpha = model.rope_alpha(lengths)
        if alpha is not None:
            alpha = jnp.broadcast_to(alpha[:, None], tokens.shape)
        dtype, longer = model.compute.dtype, length > self.config.seq_length
        angles = position_angles(self.config, positions, alpha, dtype, log_n=longer)
        return Prompts(model.embedding(tokens, dtype), angles, positions)

    def _layer(
        self, weights: Tree, x: jax.Array, angles: Rotary, positions: jax.Array, given: int
    ) -> tuple[jax.Array, KeysAndValues]:
        """Runs one layer. Keys and values [B, S, K, N] are in the order of the prompt."""
        layer = nnx.merge(nnx.graphdef(self._bind(self.names).layers), weights)
        ones = jnp.ones(positions.shape, jnp.int32)
        x, (keys, values) = layer.keeping_kv(x, angles, ones, positions)
        if (shards := _shards()) > 1:
            places = context_places(given, shards)
            keys, values = keys[:, places], values[:, places]
        return x, (keys, values)

    def _end(self, outer: Tree, x: jax.Array, lengths: jax.Array) -> jax.Array:
        model, shards = self._bind({**self.names, **outer}), _shards()
        places = jnp.asarray(context_places(x.shape[1], shards))[lengths - 1]
        return model.final_norm(jnp.take_along_axis(x, places[:, None, None], axis=1))


def _shards() -> int:
    return context_shards(jax.sharding.get_abstract_mesh())


class BoundPrograms(NamedTuple):
    """The programs and the parameters that they run with."""

    programs: LayerPrograms
    views: LayerViews


def prefill(
    model: BoundPrograms, tokens: ArrayLike, lengths: ArrayLike
) -> tuple[jax.Array, list[KeysAndValues]]:
    """Computes prompts [B, S] of these lengths [B], which are padded at their ends.

    Returns:
      The normed state of the last token of each prompt, [B, 1, D], and for each layer the keys and
      values [B, S, K, N] for a cache. Places past the length of a prompt hold noise.
    """
    programs, (outer, layers) = model
    given = np.shape(tokens)[1]
    x, angles, positions = programs.begin(outer, tokens, lengths)
    kept = []
    for number, weights in enumerate(layers):
        of_layer = angles.of_layer(number)
        x, keys_and_values = programs.layer(weights, x, of_layer, positions, given)
        kept.append(keys_and_values)
    return programs.end(outer, x, lengths), kept


def decode(
    model: Decoder,
    layers: Sequence[DecoderLayer],
    tokens: jax.Array,
    lengths: jax.Array,
    rope_alpha: jax.Array | None,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Computes logits [B, W, V] after W more tokens of every row, and adds them to the cache.

    Args:
      model, layers: see `LayerViews.bind`.
      tokens: int32[B, W].
      lengths: int32[B], the number of tokens of a row with the first of these. The logits after
        tokens that the cache has no room for mean nothing.
      rope_alpha: int32[B], `Decoder.rope_alpha` of the prompt of each row.
    """
    positions = lengths[:, None] - 1 + jnp.arange(tokens.shape[1])
    alpha = None if rope_alpha is None else rope_alpha[:, None]
    angles = position_angles(model.config, positions, alpha, model.compute.dtype, log_n=True)
    visible = jnp.arange(cache.length) <= positions[..., None]

    x = model.embedding(tokens, model.compute.dtype)
    keys, values = [], []
    each = zip(layers, cache.keys, cache.values, strict=True)
    for number, (layer, old_keys, old_values) in enumerate(each):
        query, key, value = layer.before_attention(x, angles.of_layer(number))
        keys.append(write_keys(old_keys, key, positions))
        values.append(write_values(old_values, value, positions))
        x = layer.after_attention(x, cached_attention(query, keys[-1], values[-1], visible))
    return model.logits(model.final_norm(x)), Cache(tuple(keys), tuple(values))

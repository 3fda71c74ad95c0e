"""Inference with a cache: whole prompts first, then one token a step, with unrolled layers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moi_jax.models.attention.cached import cached_attention
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Decoder, DecoderLayer, KeysAndValues, Tree
from moi_jax.models.kv_cache import Cache, write
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.rotary import position_angles
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
          parameters: the tree from which the view was made. Only its names are used.
        """
        model = bind({**parameters, **self.outer})
        graph = nnx.graphdef(model.layers)
        return model, [nnx.merge(graph, layer) for layer in self.layers]


def prefill(
    model: Decoder, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, KeysAndValues]:
    """Computes prompts [B, S] of these lengths [B], which are padded at their ends.

    Returns:
      The normed states [B, S, D], and the keys and values for a cache. Positions past the length
      of a prompt hold noise.
    """
    given, shards = tokens.shape[1], context_shards(jax.sharding.get_abstract_mesh())
    length = padded_length(given, shards)
    order = context_order(length, shards)
    tokens = jnp.pad(tokens, ((0, 0), (0, length - given)))[:, order]
    positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32), tokens.shape)
    ones = jnp.ones(tokens.shape, jnp.int32)
    alpha = model.rope_alpha(lengths)
    if alpha is not None:
        alpha = jnp.broadcast_to(alpha[:, None], tokens.shape)
    hidden, kept = model.hidden_states(
        tokens, positions, ones, extend_context=True, rope_alpha=alpha, keep_kv=True
    )
    assert kept is not None
    if shards > 1:  # back into the order of the prompt
        places = context_places(given, shards)
        hidden, kept = hidden[:, places], (kept[0][:, :, places], kept[1][:, :, places])
    return hidden, kept


def view_layers(config: ModelConfig, parameters: Tree, dtype: jax.typing.DTypeLike) -> LayerViews:
    """Unstacks the layers of a model and casts all its parameters to `dtype`."""
    specs = parameter_specs(config)

    def layer(number: int) -> Tree:
        def part(path: tuple, stacked: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return constrain(stacked[number].astype(dtype), *specs[f"layers.{name}"].axes[1:])

        return jax.tree_util.tree_map_with_path(part, parameters["layers"])

    outer = {name: tree for name, tree in parameters.items() if name != "layers"}
    outer = jax.tree.map(lambda x: x.astype(dtype), outer)
    return LayerViews(outer, tuple(layer(number) for number in range(config.num_layers)))


def decode(
    model: Decoder,
    layers: Sequence[DecoderLayer],
    tokens: jax.Array,
    lengths: jax.Array,
    rope_alpha: jax.Array | None,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Computes logits [B, V] after one more token of every row, and adds it to the cache.

    Args:
      model, layers: see `LayerViews.bind`.
      tokens: int32[B].
      lengths: int32[B], the number of tokens of a row including this one; at most the length of
        the cache.
      rope_alpha: int32[B], `Decoder.rope_alpha` of the prompt of each row.
    """
    positions = lengths[:, None] - 1
    alpha = None if rope_alpha is None else rope_alpha[:, None]
    angles = position_angles(model.config, positions, alpha, model.compute.dtype, log_n=True)
    cache = cache._replace(newest=(cache.newest + 1) % cache.length)
    visible = cache.ages() < lengths[:, None]

    x = model.embedding(tokens[:, None], model.compute.dtype)
    keys, values = [], []
    each = zip(layers, cache.keys, cache.values, strict=True)
    for number, (layer, old_keys, old_values) in enumerate(each):
        query, key, value = layer.before_attention(x, angles.of_layer(number))
        keys.append(write(old_keys, key, cache.newest))
        values.append(write(old_values, value, cache.newest))
        x = layer.after_attention(x, cached_attention(query, keys[-1], values[-1], visible))
    cache = cache._replace(keys=tuple(keys), values=tuple(values))
    return model.logits(model.final_norm(x))[:, 0], cache

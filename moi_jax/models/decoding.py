"""Inference with a cache: prompts go in whole, then one token a step, the layers unrolled."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Decoder, DecoderLayer, KeysAndValues, Tree
from moi_jax.models.kv_cache import Cache, cached_attention, write
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.rotary import position_angles, segment_positions
from moi_jax.parallel.axes import constrain


class LayerViews(NamedTuple):
    """A view of a model's parameters for decoding: the stacked layers taken apart, in order.

    A scan would copy each layer's weights out of the stack for every token, which costs more
    than the layer's own work; so they are taken apart, and cast to the compute dtype, once.

    Attributes:
      outer: all but the layers, cast.
      layers: one tree a layer, by the names of `DecoderLayer`, cast.
    """

    outer: Tree
    layers: tuple[Tree, ...]

    def bind(self, bind: Bind, parameters: Tree) -> tuple[Decoder, list[DecoderLayer]]:
        """The model of these parameters, and its layers one by one.

        Args:
          bind: parameters -> model.
          parameters: those that the view was made from; of them only the names are used.
        """
        model = bind({**parameters, **self.outer})
        graph = nnx.graphdef(model.layers)
        return model, [nnx.merge(graph, layer) for layer in self.layers]


def prefill(
    model: Decoder, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, KeysAndValues]:
    """Inference over prompts [B, S] of these lengths [B], filled up at their ends.

    Returns:
      The normed states [B, S, D], and what a cache keeps. Past a prompt's length all of it is
      noise.
    """
    ones = jnp.ones(tokens.shape, jnp.int32)
    alpha = model.rope_alpha(lengths)
    if alpha is not None:
        alpha = jnp.broadcast_to(alpha[:, None], tokens.shape)
    positions = segment_positions(ones)
    hidden, kept = model.hidden_states(
        tokens, positions, ones, extend_context=True, rope_alpha=alpha, keep_kv=True
    )
    assert kept is not None
    return hidden, kept


def view_layers(config: ModelConfig, parameters: Tree, dtype: jax.typing.DTypeLike) -> LayerViews:
    """Takes the stacked layers of a model apart."""
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
    """Logits [B, V] after one more token of every row, which goes into the cache.

    Args:
      model, layers: see `LayerViews.bind`.
      tokens: int32[B].
      lengths: int32[B], the row's tokens with this one, at most the cache's length.
      rope_alpha: int32[B], `Decoder.rope_alpha` of each row's prompt.
    """
    positions = lengths[:, None] - 1
    alpha = None if rope_alpha is None else rope_alpha[:, None]
    angles = position_angles(model.config, positions, alpha, model.compute.dtype, log_n=True)
    cache = cache._replace(newest=(cache.newest + 1) % cache.length)
    visible = cache.ages() < lengths[:, None]

    x = model.embedding(tokens[:, None], model.compute.dtype)
    keys, values = [], []
    for layer, old_keys, old_values in zip(layers, cache.keys, cache.values, strict=True):
        query, key, value = layer.before_attention(x, angles)
        keys.append(write(old_keys, key, cache.newest))
        values.append(write(old_values, value, cache.newest))
        x = layer.after_attention(x, cached_attention(query, keys[-1], values[-1], visible))
    cache = cache._replace(keys=tuple(keys), values=tuple(values))
    return model.logits(model.final_norm(x))[:, 0], cache

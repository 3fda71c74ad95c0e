"""One token more for every row of a cache: the layers one by one, unrolled."""

import jax

from moi_jax.models import rotary
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Decoder, rms_norm
from moi_jax.models.kv_cache import Cache, cached_attention, write
from moi_jax.models.parameters import Tree, declare
from moi_jax.parallel.axes import constrain


def unstack(config: ModelConfig, parameters: Tree, dtype: jax.typing.DTypeLike) -> Tree:
    """Parameters for `decode`: `layers` is a list of one tree each, all in the compute dtype.

    A scan would copy each layer's weights out of the stack for every token, which costs more
    than the layer's own work; so they are taken apart, and cast, once.
    """
    axes = {path: parameter.axes for path, parameter in declare(config).items()}

    def layer(number: int) -> Tree:
        return {
            name: constrain(stacked[number].astype(dtype), *axes[f"layers.{name}"][1:])
            for name, stacked in parameters["layers"].items()
        }

    whole = {name: x.astype(dtype) for name, x in parameters.items() if name != "layers"}
    return {**whole, "layers": [layer(number) for number in range(config.num_layers)]}


def decode(
    model: Decoder, tokens: jax.Array, lengths: jax.Array, alpha: jax.Array | None, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after one more token of every row, which goes into the cache.

    Args:
      model: of unstacked parameters.
      tokens: int32[B].
      lengths: int32[B], the row's tokens with this one, at most the cache's length.
      alpha: int32[B], `Decoder.rope_alpha` of each row's prompt.
    """
    config = model.config
    positions = lengths[:, None] - 1
    cos, sin = model.rotary_angles(positions, None if alpha is None else alpha[:, None])
    query_scale = None
    if config.logn_attention:
        query_scale = rotary.logn_scale(positions, config.seq_length, cos.dtype)
    cache = cache._replace(newest=(cache.newest + 1) % cache.length)
    visible = cache.ages() < lengths[:, None]

    x = model.embed(tokens[:, None])
    keys, values = [], []
    for block, old_keys, old_values in zip(model.blocks, cache.keys, cache.values, strict=True):
        query, key, value = block.heads(x, cos, sin, query_scale)
        keys.append(write(old_keys, key, cache.newest))
        values.append(write(old_values, value, cache.newest))
        x = block.mix(x, cached_attention(query, keys[-1], values[-1], visible))
        x = constrain(x, "batch", None, None)
    hidden = rms_norm(x, model.final_norm[...], config.norm_eps)
    cache = cache._replace(keys=tuple(keys), values=tuple(values))
    return model.logits(hidden)[:, 0], cache

"""The one decoder: embedding, a scan over stacked layers, final norm, head (tied or not)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moi_jax.models import rotary
from moi_jax.models.compute import Compute
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import Tree
from moi_jax.parallel.axes import constrain


class Block(nnx.Module):
    """A layer. `Decoder.layers` is all of them in one, each parameter with a leading L axis."""

    attention_norm: nnx.Param
    query: nnx.Param
    key: nnx.Param
    value: nnx.Param
    out: nnx.Param
    mlp_norm: nnx.Param
    gate: nnx.Param
    up: nnx.Param
    down: nnx.Param
    # Where the family has them; so are the biases of `project`.
    out_bias: nnx.Param
    query_norm: nnx.Param
    key_norm: nnx.Param

    def __init__(self, config: ModelConfig, parameters: Tree):
        self.config = config
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    def heads(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, query_scale: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, S, D] -> query [B, S, H, N], key and value [B, S, K, N], ready for attention.

        query_scale [B, S] is log-n attention, None for 1.
        """
        y = rms_norm(x, self.attention_norm[...], self.config.norm_eps)
        query = self.project(y, "query")
        key = self.project(y, "key")
        if self.config.qk_norm:
            query = rms_norm(query, self.query_norm[...], self.config.norm_eps)
            key = rms_norm(key, self.key_norm[...], self.config.norm_eps)
        query, key = (rotary.apply_rotary(heads, cos, sin) for heads in (query, key))
        if query_scale is not None:
            query = query * query_scale[..., None, None].astype(query.dtype)
        return query, key, self.project(y, "value")

    def mix(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Adds what attention gave [B, S, H, N], and the MLP's part, to x [B, S, D]."""
        x = x + jnp.einsum("bshn,hnd->bsd", mixed, self.out[...].astype(x.dtype))
        if self.config.out_bias:
            x = x + self.out_bias[...].astype(x.dtype)

        y = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gate = jnp.einsum("bsd,df->bsf", y, self.gate[...].astype(x.dtype))
        up = jnp.einsum("bsd,df->bsf", y, self.up[...].astype(x.dtype))
        down = self.down[...].astype(x.dtype)
        return x + jnp.einsum("bsf,fd->bsd", up * jax.nn.silu(gate), down)

    def project(self, y: jax.Array, name: str) -> jax.Array:
        """[B, S, D] -> [B, S, heads, N], with the bias where the family has one."""
        heads = jnp.einsum("bsd,dhn->bshn", y, getattr(self, name)[...].astype(y.dtype))
        if self.config.qkv_bias:
            heads = heads + getattr(self, f"{name}_bias")[...].astype(y.dtype)
        return heads


class Decoder(nnx.Module):
    """A decoder-only language model over a tree of parameters (see parameters.py)."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Tree,
        compute: Compute,
    ):
        """
        Args:
          parameters: as declared; or as `decoding.unstack` gives them, to decode with a cache.
        """
        self.config = config
        self.compute_dtype = jnp.dtype(compute.dtype)
        self.remat = compute.remat
        self.attention = compute.attention
        self.embedding = nnx.Param(parameters["embedding"])
        layers = parameters["layers"]
        if isinstance(layers, dict):
            self.layers = Block(config, layers)
        else:
            self.blocks = nnx.List([Block(config, layer) for layer in layers])
        self.final_norm = nnx.Param(parameters["final_norm"])
        if not config.tied_head:
            self.head = nnx.Param(parameters["head"])

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Inference: float32 logits [B, S, V] for int32 tokens [B, S].

        segment_ids None is one segment a row; positions None restart with each segment. Past
        the model's seq_length a segment has Qwen's dynamic NTK and log-n attention.
        """
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = rotary.segment_positions(segment_ids)
        graph, parameters = nnx.split(self)
        return _inference(graph, parameters, tokens, positions, segment_ids)

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        training: bool,
        rope_alpha: jax.Array | None = None,
    ) -> jax.Array:
        """Normed final states [B, S, D] in the compute dtype.

        Args:
          training: dynamic NTK and log-n attention are off, as in the reference.
          rope_alpha: NTK factor per token [B, S]. None: from the length of its segment. A
            sampler hands in the prompt's, which a generation keeps to its end.
        """
        return self._states(tokens, positions, segment_ids, training, rope_alpha)[0]

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Inference over prompts [B, S] of these lengths [B], filled up at their ends.

        Returns:
          The normed states [B, S, D], and what a cache keeps: every layer's keys and values,
          two of [L, B, S, K, N]. Past a prompt's length all of it is noise.
        """
        ones = jnp.ones(tokens.shape, jnp.int32)
        alpha = self.rope_alpha(lengths)
        if alpha is not None:
            alpha = jnp.broadcast_to(alpha[:, None], tokens.shape)
        positions = rotary.segment_positions(ones)
        return self._states(tokens, positions, ones, False, alpha, keep_heads=True)

    def rope_alpha(self, lengths: jax.Array) -> jax.Array | None:
        """The NTK factor of prompts of these lengths; None for a model without."""
        if not self.config.dynamic_ntk:
            return None
        return rotary.ntk_alpha(lengths, self.config.seq_length)

    def _states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        training: bool,
        rope_alpha: jax.Array | None,
        keep_heads: bool = False,
    ) -> tuple[jax.Array, Any]:
        """The normed states, and every layer's keys and values where they are to be kept."""
        config = self.config
        statistics = jnp.promote_types(self.compute_dtype, jnp.float32)
        # A row within seq_length needs no scaling, and the shape says so at trace time.
        longer = not training and tokens.shape[1] > config.seq_length
        if longer and config.dynamic_ntk and rope_alpha is None:
            lengths = rotary.segment_lengths(segment_ids)
            rope_alpha = rotary.ntk_alpha(lengths, config.seq_length)
        cos, sin = self.rotary_angles(positions, rope_alpha)
        query_scale = None
        if longer and config.logn_attention:
            query_scale = rotary.logn_scale(positions, config.seq_length, statistics)

        x = self.embed(tokens)
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, parameters: Any) -> tuple[jax.Array, Any]:
            block = nnx.merge(graph, parameters)
            query, key, value = block.heads(x, cos, sin, query_scale)
            x = block.mix(x, self.attention(query, key, value, segment_ids, positions))
            return constrain(x, "batch", "sequence", None), (key, value) if keep_heads else None

        x, heads = jax.lax.scan(_with_remat(layer, self.remat), x, stacked)
        return rms_norm(x, self.final_norm[...], config.norm_eps), heads

    def rotary_angles(
        self, positions: jax.Array, alpha: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """cos and sin [B, S, N/2] at positions [B, S], under NTK factors [B, S] where given."""
        return rotary.rotary_angles(
            positions,
            self.config.head_dim,
            self.config.rope_base,
            self.config.rope_scaling,
            alpha,
            jnp.promote_types(self.compute_dtype, jnp.float32),
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, S] -> [B, S, D] in the compute dtype, split by rows."""
        # Each device looks up its part of D for the rows of all, and gets its own rows' other
        # parts by an all-to-all: neither the table nor its gradient is ever whole on a device.
        x = jnp.take(self.embedding[...], tokens, axis=0).astype(self.compute_dtype)
        x = constrain(x, "logits_batch", "sequence", "embed")
        return constrain(x, "batch", "sequence", None)

    def head_weight(self) -> jax.Array:
        """[D, V] in the compute dtype: the head's, or the embedding's where they are tied."""
        if not self.config.tied_head:
            return self.head[...].astype(self.compute_dtype)
        table = self.embedding[...].astype(self.compute_dtype)
        return constrain(table, "head_vocab", None).T

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, V] in the compute dtype or float32, the wider."""
        statistics = jnp.promote_types(self.compute_dtype, jnp.float32)
        head = self.head_weight()
        return jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=statistics)


Bind = Callable[[Tree], Decoder]


def make_model(config: ModelConfig, compute: Compute | None = None) -> Bind:
    """The one way to a model: a function from its parameters to the `Decoder` over them."""
    return partial(Decoder, config, compute=compute or Compute())


@partial(jax.jit, static_argnums=0)
def _inference(
    graph: Any, parameters: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """One compilation for all calls of the same shapes."""
    model = nnx.merge(graph, parameters)
    hidden = model.hidden_states(tokens, positions, segment_ids, training=False)
    return model.logits(hidden).astype(jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis: statistics in float32 or wider, cast back, then weighted."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


def _with_remat(layer: Any, remat: str) -> Any:
    if remat == "none":
        return layer
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan XLA cannot merge the recomputation with the forward pass anyway.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)

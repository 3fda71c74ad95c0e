"""The decoder of all families: embedding, a scan over stacked layers, final norm, head.

Each parameter is declared once, in the module that uses it: shape, logical axes, initialiser,
whether it decays, whether it is trained. Shardings, optimizer masks, weight tables and the paths of
checkpoints are derived from these modules (parameters.py).
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from moi_jax.models import rotary
from moi_jax.models.adapter import Adapter
from moi_jax.models.attention import AttentionFn
from moi_jax.models.compute import Compute
from moi_jax.models.config import ModelConfig
from moi_jax.models.linear import Dims, Linear, normal, parameter
from moi_jax.models.rotary import Rotary
from moi_jax.parallel.axes import constrain

# Nested dicts of arrays; the keys are the names of modules and parameters.
Tree = dict[str, Any]
# Keys and values: [B, S, K, N] each of one layer, [L, B, S, K, N] each of all layers.
KeysAndValues = tuple[jax.Array, jax.Array]


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis: normalises in float32 or wider, casts back, then scales."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.scale = parameter(jnp.ones((width,), dtype), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: DTypeLike, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Maps int32[B, S] to the rows of the table [V, D], cast to `dtype` and split by rows.

    Each device looks up its part of D for all tokens. An all-to-all for each mesh axis then gives
    it the other parts of its own tokens. So no device ever holds the whole table or its gradient.
    """
    tokens = constrain(tokens, "logits_batch", None)
    x = jnp.take(table.astype(dtype), tokens, axis=0)
    x = constrain(x, "logits_batch", None, "embed")
    x = constrain(x, "logits_batch", "sequence", "embed")
    return constrain(x, "batch", "sequence", None)


def _lookup_forward(
    dtype: DTypeLike, table: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lookup(dtype, table, tokens), (table, tokens)


def _lookup_backward(
    dtype: DTypeLike, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None]:
    table, tokens = residuals
    tokens = constrain(tokens, "logits_batch", None)
    cotangent = constrain(cotangent, "logits_batch", "sequence", "embed")
    cotangent = constrain(cotangent, "logits_batch", None, "embed").astype(table.dtype)
    gradient = jnp.zeros_like(table).at[tokens].add(cotangent)
    return constrain(gradient, "vocab", "embed"), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Embedding(nnx.Module):
    """The table of token vectors [V, D]. In a tied model it is also the head."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        table = normal(rngs, shape, config.initializer_range, dtype)
        self.table = parameter(table, ("vocab", "embed"), decays=True)

    def __call__(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Maps int32[B, S] to [B, S, D], split by rows."""
        return _lookup(dtype, self.table[...], tokens)


class Attention(nnx.Module):
    """The projections before and after attention itself, which is a backend (attention/)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        linear = partial(Linear, stddev=c.initializer_range, dtype=dtype, rngs=rngs)
        norm = partial(RMSNorm, c.head_dim, eps=c.norm_eps, dtype=dtype)
        embed: Dims = {"embed": c.hidden_size}
        heads: Dims = {"heads": c.num_heads, None: c.head_dim}
        kv_heads: Dims = {"kv_heads": c.num_kv_heads, None: c.head_dim}
        self.query = linear(embed, heads, bias=c.qkv_bias)
        self.key = linear(embed, kv_heads, bias=c.qkv_bias)
        self.value = linear(embed, kv_heads, bias=c.qkv_bias)
        self.out = linear(heads, embed, bias=c.out_bias)
        self.query_norm = norm() if c.qk_norm else None
        self.key_norm = norm() if c.qk_norm else None

    def project(self, x: jax.Array, angles: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps [B, S, D] to rotated query [B, S, H, N] and key, and value [B, S, K, N]."""
        query = checkpoint_name(self.query(x), "query_proj")
        key = checkpoint_name(self.key(x), "key_proj")
        value = checkpoint_name(self.value(x), "value_proj")
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (rotary.apply_rotary(heads, angles) for heads in (query, key))
        if angles.query_scale is not None:
            query = query * angles.query_scale[..., None, None].astype(query.dtype)
        # A device has the queries of its own tokens, and gathers the keys and values of the row.
        key, value = (constrain(x, "batch", None, "kv_heads", None) for x in (key, value))
        return query, key, value


class MLP(nnx.Module):
    """The gated MLP: down(up(x) * silu(gate(x)))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(Linear, stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        embed: Dims = {"embed": config.hidden_size}
        mlp: Dims = {"mlp": config.mlp_width}
        self.gate = linear(embed, mlp)
        self.up = linear(embed, mlp)
        self.down = linear(mlp, embed)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, S, D] to [B, S, D]."""
        gate = checkpoint_name(self.gate(x), "mlp_gate")
        up = checkpoint_name(self.up(x), "mlp_up")
        return self.down(up * jax.nn.silu(gate))


class DecoderLayer(nnx.Module):
    """A pre-norm layer. `Decoder.layers` stacks all layers: each parameter has a leading axis L."""

    def __init__(
        self,
        config: ModelConfig,
        attend: AttentionFn,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.attend = attend
        if config.adapter is not None:  # drawn last: the others are those of a model without it
            self._add_adapters(config.adapter, rngs)

    def _add_adapters(self, adapter: Adapter, rngs: nnx.Rngs) -> None:
        for path, module in nnx.iter_modules(self):
            named = ".".join(("layers", *map(str, path))) in adapter.targets
            if named and isinstance(module, Linear):
                module.add_adapter(adapter.rank, adapter.scale, rngs)
        if adapter.quantization:
            for _, module in list(nnx.iter_modules(self)):
                if isinstance(module, Linear):
                    module.quantize(adapter.quantization)

    def __call__(
        self, x: jax.Array, angles: Rotary, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, None]:
        """Maps [B, S, D] to [B, S, D]. The None is for the scan, which keeps nothing."""
        x = checkpoint_name(x, "decoder_layer_input")
        query, key, value = self.before_attention(x, angles)
        attended = self.attend(query, key, value, segment_ids, positions)
        return self.after_attention(x, attended), None

    def keeping_kv(
        self, x: jax.Array, angles: Rotary, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, KeysAndValues]:
        """Does the same as `__call__`, and returns the keys and values [B, S, K, N] for a cache."""
        query, key, value = self.before_attention(x, angles)
        attended = self.attend(query, key, value, segment_ids, positions)
        return self.after_attention(x, attended), (key, value)

    def before_attention(
        self, x: jax.Array, angles: Rotary
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps [B, S, D] to query [B, S, H, N], key and value [B, S, K, N]."""
        return self.attention.project(self.attention_norm(x), angles)

    def after_attention(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the projected output of attention [B, S, H, N], then the MLP's, to x [B, S, D]."""
        x = x + checkpoint_name(self.attention.out(attended), "out_proj")
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", None)


class Decoder(nnx.Module):
    """A decoder-only language model."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes a model with random parameters: normal(initializer_range), zero biases, unit norms.

        The values depend on the seed alone, not on the mesh on which they are made.
        """
        self.config = config
        self.compute = compute or Compute()
        self.embedding = Embedding(config, dtype=param_dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None, "logical_axes": "layers"})
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, self.compute.attention, dtype=param_dtype, rngs=rngs)

        self.layers = stacked_layers(rngs)
        self.final_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=param_dtype)
        self.head = None if config.tied_head else self._separate_head(param_dtype, rngs)

    def _separate_head(self, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
        inputs: Dims = {"embed": self.config.hidden_size}
        outputs: Dims = {"vocab": self.config.vocab_size}
        stddev = self.config.initializer_range
        return Linear(inputs, outputs, stddev=stddev, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Computes float32 logits [B, S, V] for int32 tokens [B, S], as at inference.

        Without segment_ids each row is one segment. Without positions, positions restart wherever
        the id changes, so a segment must be one run of equal ids. A Qwen v1
        segment longer than seq_length gets dynamic NTK and log-n attention.
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
        extend_context: bool,
        rope_alpha: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the normed final states [B, S, D] in the compute dtype.

        Args:
          positions: int32[B, S], from 0 in each segment. A token sees its own segment up to its
            own position.
          extend_context: use Qwen v1's dynamic NTK and log-n attention past seq_length. Training
            does not use them, like the reference.
          rope_alpha: NTK factor per token [B, S]. None computes it from the length of the token's
            segment. A sampler passes the factor of the prompt, which stays the same until the
            end of the generation.
        """
        config = self.config
        # A row within seq_length needs no scaling; its shape is known at trace time.
        longer = extend_context and tokens.shape[1] > config.seq_length
        if longer and config.dynamic_ntk and rope_alpha is None:
            rope_alpha = self.rope_alpha(rotary.segment_lengths(segment_ids))
        angles = rotary.position_angles(
            config, positions, rope_alpha, self.compute.dtype, log_n=longer
        )

        layer, remat = DecoderLayer.__call__, self.compute.remat
        run = nnx.scan(
            remat.apply(layer) if remat else layer,
            in_axes=(0, nnx.Carry, rotary.LAYER_AXES, None, None),
            out_axes=(nnx.Carry, 0),
        )
        x = self.embedding(tokens, self.compute.dtype)
        x, _ = run(self.layers, x, angles, segment_ids, positions)
        return self.final_norm(x)

    def rope_alpha(self, lengths: jax.Array) -> jax.Array | None:
        """Returns the NTK factor of segments of these lengths; None without dynamic NTK."""
        if not self.config.dynamic_ntk:
            return None
        return rotary.ntk_alpha(lengths, self.config.seq_length)

    def head_kernel(self) -> jax.Array:
        """Returns [D, V] in the dtype of the parameters, from the head or the tied embedding."""
        return self.embedding.table[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps [B, S, D] to [B, S, V] in the compute dtype, but at least float32."""
        wide = jnp.promote_types(self.compute.dtype, jnp.float32)
        head = self.head_kernel().astype(self.compute.dtype)
        return jnp.einsum("bsd,dv->bsv", hidden, head, preferred_element_type=wide)


# Parameters -> the model that has them. They are one tree, or several that together make it up.
Bind = Callable[..., Decoder]


def abstract_model(config: ModelConfig, compute: Compute) -> Decoder:
    """Returns the model with abstract float32 parameters: shapes instead of arrays."""
    return _abstract_model(config, config.default_system_prompt, compute)


@cache
def _abstract_model(config: ModelConfig, prompt: str, compute: Compute) -> Decoder:
    # The prompt takes no part in the comparison of configs, but a model carries its own.
    del prompt
    return nnx.eval_shape(lambda: Decoder(config, compute, rngs=nnx.Rngs(0)))


def make_model(config: ModelConfig, compute: Compute | None = None) -> Bind:
    """Returns a function from parameters to the `Decoder` that has them.

    All code makes its models with it. It may be called under jit, with tracers as parameters.
    """
    return partial(nnx.merge, nnx.graphdef(abstract_model(config, compute or Compute())))


@partial(jax.jit, static_argnums=0)
def _inference(
    graph: Any, parameters: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Computes the logits; compiled once for all calls with the same shapes."""
    model = nnx.merge(graph, parameters)
    hidden = model.hidden_states(tokens, positions, segment_ids, extend_context=True)
    return model.logits(hidden).astype(jnp.float32)

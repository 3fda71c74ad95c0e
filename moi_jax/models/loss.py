"""The vocabulary loss, in chunks of tokens: logits [B, S, V] are never materialised.

At rest the head [D, V] is sharded as it is declared. Here it is split by vocabulary over all
devices that share the logits (the logical axis head_vocab), padded to a multiple of their number.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from moi_jax.parallel.axes import constrain, shard_count

# Tokens in a chunk on one device. Their logits take 297 MiB in float32 at Qwen's vocabulary.
CHUNK_TOKENS = 512


@jax.custom_vjp
def weighted_nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the sum of weight times negative log-likelihood, the objective of training.

    The gradient is computed in the forward pass, chunk by chunk, as in Liger Kernel (arXiv
    2410.10989): three products with the head, where a backward pass that recomputes the logits
    needs four.

    Args:
      hidden: [B, S, D] final states, in the compute dtype.
      head: [D, V], in the dtype of the parameters.
      targets: int32[B, S].
      weights: float[B, S], not negative. A position with weight zero counts nothing, even if its
        likelihood is not finite.

    Returns:
      The sum, which has a gradient in `hidden` and `head`; and the nll of each target in nats,
      [B, S], 0 where the weight is, which has none. Both are float32 or wider.
    """
    nll, _ = token_scores(hidden, head, targets, weights > 0)
    return _weighted_sum(nll, weights), nll


def token_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the nll of each target, [B, S], and whether it is the most likely token, bool[B, S].

    Args:
      hidden, head, targets: see `weighted_nll`.
      counts: bool[B, S], the positions that are asked for. The others get 0 and False.
    """
    chunks, vocabulary = _Chunks.of(counts), head.shape[1]
    head = _split_by_vocabulary(head.astype(hidden.dtype))

    def step(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, Any]:
        hidden, targets, counts = map(chunks.gather, chunk)
        logits = _logits(hidden, head, vocabulary)
        nll = jax.nn.logsumexp(logits, axis=-1) - _at_targets(logits, targets)
        likeliest = counts & (jnp.argmax(logits, axis=-1) == targets)
        return None, (chunks.scatter(jnp.where(counts, nll, 0)), chunks.scatter(likeliest))

    return chunks.scan(step, None, (hidden, targets, counts))[1]


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the result of `weighted_nll` and its gradients in hidden and head."""
    chunks, vocabulary = _Chunks.of(weights > 0), head.shape[1]
    split = _split_by_vocabulary(head.astype(hidden.dtype))
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def step(head_gradient: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        hidden, targets, weights = map(chunks.gather, chunk)
        logits = _logits(hidden, split, vocabulary)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        nll = jnp.where(weights > 0, log_sum - _at_targets(logits, targets), 0)
        slope = jnp.exp(logits - log_sum[..., None]) - _is_target(logits, targets)
        weights = weights.astype(wide)[..., None]
        slope = jnp.where(weights > 0, weights * slope, 0).astype(hidden.dtype)
        # 0 times a state that is not finite is not 0.
        hidden = constrain(jnp.where(weights > 0, hidden, 0), "logits_batch", None, None)
        hidden_gradient = jnp.einsum("gtv,dv->gtd", slope, split)
        # A sum for each group of rows. They are added up once, at the end, not for each chunk.
        new = jnp.einsum("gtd,gtv->gdv", hidden, slope, preferred_element_type=wide)
        head_gradient = constrain(head_gradient + new, "logits_batch", None, "head_vocab")
        return head_gradient, (chunks.scatter(nll), chunks.scatter(hidden_gradient))

    zeros = jnp.zeros((chunks.groups, *split.shape), wide)
    zeros = constrain(zeros, "logits_batch", None, "head_vocab")
    head_gradient, (nll, hidden_gradient) = chunks.scan(step, zeros, (hidden, targets, weights))
    head_gradient = constrain(jnp.sum(head_gradient, axis=0), "embed", "vocab")[:, :vocabulary]
    results = _weighted_sum(nll, weights), nll
    return results, (hidden_gradient, head_gradient.astype(head.dtype))


def _backward(
    gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    factor, _ = cotangents
    return *((g * factor).astype(g.dtype) for g in gradients), None, None


weighted_nll.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How tokens [B, S, ...] are cut into chunks, those that count first.

    Each device has the same share of a chunk, `width` of its own tokens. So no token has to travel
    for the new order. The chunks in which no token counts are skipped.

    Attributes:
      shape: (B, S).
      parts: into how many parts the mesh splits B and S.
      groups: the groups of rows, G, which different devices compute the logits of.
      width: the tokens of a chunk in each part.
      order: int32[*parts, chunks * width], the tokens of each part in the order of the chunks.
        The part is padded at its end.
      places: its inverse, the place of each token in the order of the chunks.
      needed: bool[chunks], whether a token of the chunk counts.
    """

    shape: tuple[int, int]
    parts: tuple[int, int]
    groups: int
    width: int
    order: jax.Array
    places: jax.Array
    needed: jax.Array

    @classmethod
    def of(cls, counts: jax.Array) -> "_Chunks":
        """Makes chunks of at most CHUNK_TOKENS on a device; counts bool[B, S]."""
        rows, length = counts.shape
        parts = shard_count("batch", rows), shard_count("sequence", length)
        mesh = jax.sharding.get_abstract_mesh()
        limit = CHUNK_TOKENS * (1 if mesh.empty else mesh.size) // math.prod(parts)
        share = counts.size // math.prod(parts)
        chunks = math.ceil(share / limit)
        width = math.ceil(share / chunks)
        counts = _pad(_cut(counts, parts), chunks * width)
        order = jnp.argsort(~counts, axis=-1, stable=True)
        return cls(
            shape=(rows, length),
            parts=parts,
            groups=shard_count("logits_batch", parts[0]),
            width=width,
            order=order,
            places=jnp.argsort(order, axis=-1),
            needed=jnp.max(jnp.sum(counts, axis=-1)) > width * jnp.arange(chunks),
        )

    def scan(self, step: Any, carry: Any, arrays: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        """Runs `step` as `jax.lax.scan` does, over the chunks of arrays [B, S, ...].

        Returns:
          The last carry, and the results [B, S, ...], 0 in the chunks that are skipped.
        """

        def skip(carry: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            results = jax.eval_shape(step, carry, chunk)[1]
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)

        def one(carry: Any, inputs: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[Any, Any]:
            needed, chunk = inputs
            return jax.lax.cond(needed, step, skip, carry, chunk)

        carry, results = jax.lax.scan(one, carry, (self.needed, tuple(map(self._split, arrays))))
        return carry, jax.tree.map(self._join, results)

    def gather(self, x: jax.Array) -> jax.Array:
        """[*parts, width, ...] -> [G, T, ...], on all devices that share the vocabulary."""
        x = constrain(x, "logits_batch", *[None] * (x.ndim - 1))
        return x.reshape(self.groups, -1, *x.shape[3:])

    def scatter(self, x: jax.Array) -> jax.Array:
        """[G, T, ...] -> [*parts, width, ...], each token on its own device."""
        x = x.reshape(*self.parts, self.width, *x.shape[2:])
        return constrain(x, "batch", "sequence", *[None] * (x.ndim - 2))

    def _split(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [chunks, *parts, width, ...]."""
        x = _pad(_cut(x, self.parts), self.order.shape[2])
        x = _permute(x, self.order, self.places)
        return jnp.moveaxis(x.reshape(*self.parts, -1, self.width, *x.shape[3:]), 2, 0)

    def _join(self, x: jax.Array) -> jax.Array:
        """The inverse of `_split`."""
        x = jnp.moveaxis(x, 0, 2).reshape(*self.order.shape, *x.shape[4:])
        x = constrain(x, "batch", "sequence", *[None] * (x.ndim - 2))
        rows, parts = self.shape[0] // self.parts[0], self.parts[1]
        x = _permute(x, self.places, self.order)[:, :, : rows * self.shape[1] // parts]
        x = x.reshape(self.parts[0], parts, rows, -1, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 2).reshape(*self.shape, *x.shape[4:])
        return constrain(x, "batch", "sequence", *[None] * (x.ndim - 2))


def _cut(x: jax.Array, parts: tuple[int, int]) -> jax.Array:
    """[B, S, ...] -> [*parts, tokens of a part, ...]; each part stays on its device."""
    rows, length = x.shape[0] // parts[0], x.shape[1] // parts[1]
    x = jnp.moveaxis(x.reshape(parts[0], rows, parts[1], length, *x.shape[2:]), 2, 1)
    x = x.reshape(*parts, -1, *x.shape[4:])
    return constrain(x, "batch", "sequence", *[None] * (x.ndim - 2))


def _pad(x: jax.Array, size: int) -> jax.Array:
    """Pads the third axis with zeros."""
    return jnp.pad(x, [(0, size - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)])


def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Takes [*parts, n, ...] in the order int[*parts, n] of its third axis.

    Args:
      inverse: of the order.
    """
    if x.ndim == 3:
        # Of numbers, libtpu 0.0.52 makes a gather on another core that jaxlib 0.10.2 cannot read.
        return jax.lax.sort((inverse, x), num_keys=1)[1]
    return jnp.take_along_axis(x, order[..., None], axis=2)


def _split_by_vocabulary(head: jax.Array) -> jax.Array:
    """[D, V] -> [D, V padded with zeros to the number of parts], split over head_vocab."""
    padding = -head.shape[1] % shard_count("head_vocab")
    return constrain(jnp.pad(head, ((0, 0), (0, padding))), None, "head_vocab")


def _logits(hidden: jax.Array, head: jax.Array, vocabulary: int) -> jax.Array:
    """[G, T, D] and [D, padded V] -> [G, T, padded V], -inf from `vocabulary` on."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("gtd,dv->gtv", hidden, head, preferred_element_type=wide)
    logits = constrain(logits, "logits_batch", None, "head_vocab")
    if head.shape[1] == vocabulary:
        return logits
    return jnp.where(jnp.arange(head.shape[1]) < vocabulary, logits, -jnp.inf)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _at_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    if shard_count("head_vocab") == 1:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # A gather would not stay local where the vocabulary is split.
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)


def _weighted_sum(nll: jax.Array, weights: jax.Array) -> jax.Array:
    weights = weights.astype(nll.dtype)
    return jnp.sum(jnp.where(weights > 0, weights * nll, 0))

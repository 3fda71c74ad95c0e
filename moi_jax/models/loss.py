"""The vocabulary loss, in chunks of tokens: logits [B, S, V] are never materialised.

At rest the head [D, V] is sharded as it is declared. Here it is split by vocabulary over all
devices that share the logits (the logical axis head_vocab), padded to a multiple of their number.
"""

import dataclasses
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
      [B, S], which has none. Both are float32 or wider.
    """
    nll, _ = token_scores(hidden, head, targets)
    return _weighted_sum(nll, weights), nll


def token_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the nll of each target, [B, S], and whether it is the most likely token, bool[B, S].

    The arguments are those of `weighted_nll`.
    """
    chunks, vocabulary = _Chunks.of(hidden), head.shape[1]
    head = _split_by_vocabulary(head.astype(hidden.dtype))

    def step(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        hidden, targets = map(chunks.gather, chunk)
        logits = _logits(hidden, head, vocabulary)
        nll = jax.nn.logsumexp(logits, axis=-1) - _at_targets(logits, targets)
        likeliest = jnp.argmax(logits, axis=-1) == targets
        return None, (chunks.scatter(nll), chunks.scatter(likeliest))

    _, scores = jax.lax.scan(step, None, (chunks.split(hidden), chunks.split(targets)))
    return jax.tree.map(chunks.join, scores)


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the result of `weighted_nll` and its gradients in hidden and head."""
    chunks, vocabulary = _Chunks.of(hidden), head.shape[1]
    split = _split_by_vocabulary(head.astype(hidden.dtype))
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def step(head_gradient: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        hidden, targets, weights = map(chunks.gather, chunk)
        logits = _logits(hidden, split, vocabulary)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        nll = log_sum - _at_targets(logits, targets)
        slope = jnp.exp(logits - log_sum[..., None]) - _is_target(logits, targets)
        weights = weights.astype(wide)[..., None]
        slope = jnp.where(weights > 0, weights * slope, 0).astype(hidden.dtype)
        hidden = jnp.where(weights > 0, hidden, 0)  # 0 times a state that is not finite is not 0
        hidden_gradient = jnp.einsum("gtv,dv->gtd", slope, split)
        # A sum for each group of rows. They are added up once, at the end, not for each chunk.
        new = jnp.einsum("gtd,gtv->gdv", hidden, slope, preferred_element_type=wide)
        head_gradient = constrain(head_gradient + new, "logits_batch", None, "head_vocab")
        return head_gradient, (chunks.scatter(nll), chunks.scatter(hidden_gradient))

    zeros = jnp.zeros((chunks.groups, *split.shape), wide)
    head_gradient, (nll, hidden_gradient) = jax.lax.scan(
        step,
        constrain(zeros, "logits_batch", None, "head_vocab"),
        tuple(map(chunks.split, (hidden, targets, weights))),
    )
    nll, hidden_gradient = chunks.join(nll), chunks.join(hidden_gradient)
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
    """How tokens [B, S, ...] are cut into chunks along the sequence.

    A chunk takes `width` tokens from each of the parts into which the mesh splits a row, so that
    every device holds a share of each chunk.

    Attributes:
      groups: the groups of rows, G, which different devices compute the logits of.
    """

    rows: int
    length: int
    parts: int
    width: int
    groups: int

    @classmethod
    def of(cls, hidden: jax.Array) -> "_Chunks":
        """Chooses the chunks for final states [B, S, D]: at most CHUNK_TOKENS on a device."""
        rows, length, _ = hidden.shape
        parts, groups = shard_count("sequence", length), shard_count("logits_batch", rows)
        mesh = jax.sharding.get_abstract_mesh()
        devices = 1 if mesh.empty else mesh.size
        limit = max(CHUNK_TOKENS * devices // (rows * parts), 1)
        share = length // parts
        width = max(w for w in range(1, share + 1) if share % w == 0 and w <= limit)
        return cls(rows, length, parts, width, groups)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [chunks, B, parts, width, ...]."""
        x = x.reshape(self.rows, self.parts, -1, self.width, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return jnp.moveaxis(x, 0, 2).reshape(self.rows, self.length, *x.shape[4:])

    def gather(self, x: jax.Array) -> jax.Array:
        """[B, parts, width, ...] -> [G, T, ...], on all devices that share the vocabulary."""
        x = constrain(x, "logits_batch", *[None] * (x.ndim - 1))
        return x.reshape(self.groups, -1, *x.shape[3:])

    def scatter(self, x: jax.Array) -> jax.Array:
        """[G, T, ...] -> [B, parts, width, ...], each token on the device of its row."""
        x = x.reshape(self.rows, self.parts, self.width, *x.shape[2:])
        return constrain(x, "batch", "sequence", *[None] * (x.ndim - 2))


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

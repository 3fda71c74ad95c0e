"""The vocabulary loss, in chunks of tokens: logits [B, S, V] are never materialised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moi_jax.parallel.axes import constrain

# Tokens in a chunk on one device. Their logits take 1.2 GiB in float32 at Qwen's vocabulary.
CHUNK_TOKENS = 2048


def token_nll(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the negative log-likelihood of each target in nats, [B, S], float32 or wider.

    The backward pass recomputes the logits of each chunk instead of keeping them.

    Args:
      hidden: [B, S, D] final states, in the compute dtype.
      head: [D, V].
      targets: int32[B, S]. Positions without a target get a value too; give it weight 0.
    """
    return _in_chunks(_nll, hidden, head, targets)


def token_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes `token_nll`, and whether each target is the most likely token, bool[B, S]."""

    def chunk(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _nll(logits, targets), jnp.argmax(logits, axis=-1) == targets

    return _in_chunks(chunk, hidden, head, targets)


def _in_chunks(
    score: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
) -> Any:
    """Applies score(logits [B, width, V], targets [B, width]) to each chunk; returns [B, S]."""
    b, s, d = hidden.shape
    head = head.astype(hidden.dtype)
    width = _chunk_width(b, s)

    def chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        return None, score(_logits(inputs[0], head), inputs[1])

    hidden = hidden.reshape(b, s // width, width, d).swapaxes(0, 1)
    targets = targets.reshape(b, s // width, width).swapaxes(0, 1)
    # Each device has a part of every chunk; the chunks themselves come one after another.
    hidden = constrain(hidden, None, "batch", "sequence", None)
    targets = constrain(targets, None, "batch", "sequence")
    _, scores = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), None, (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, s), scores)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=wide)
    return constrain(logits, "logits_batch", None, "head_vocab")


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A masked sum instead of a gather: it stays local if the vocabulary is sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target_logit


def _chunk_width(b: int, s: int) -> int:
    """Returns the widest divisor of S for which a device has at most CHUNK_TOKENS of [B, width]."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    limit = max(CHUNK_TOKENS * devices // b, 1)
    return max(width for width in range(1, s + 1) if s % width == 0 and width <= limit)

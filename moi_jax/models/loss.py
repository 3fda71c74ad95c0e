"""The vocabulary loss, in chunks of tokens: logits [B, S, V] are never whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moi_jax.parallel.axes import constrain

# Tokens a device whose logits exist at a time: 1.2 GiB of float32 at Qwen's vocabulary.
CHUNK_TOKENS = 2048


def token_nll(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats of each target, [B, S], float32 or wider.

    Args:
      hidden: [B, S, D] final states, in the compute dtype.
      head: [D, V].
      targets: int32[B, S]; positions without a target get a value all the same: weigh it 0.

    The backward pass recomputes each chunk's logits instead of keeping them.
    """
    return _in_chunks(_nll, hidden, head, targets)


def token_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`token_nll`, and whether each target is the likeliest of all, bool[B, S]."""

    def chunk(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _nll(logits, targets), jnp.argmax(logits, axis=-1) == targets

    return _in_chunks(chunk, hidden, head, targets)


def _in_chunks(
    score: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
) -> Any:
    """score(logits [B, width, V], targets [B, width]) -> [B, width], put together to [B, S]."""
    b, s, d = hidden.shape
    head = head.astype(hidden.dtype)
    width = _chunk_width(b, s)

    def chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        return None, score(_logits(inputs[0], head), inputs[1])

    hidden = hidden.reshape(b, s // width, width, d).swapaxes(0, 1)
    targets = targets.reshape(b, s // width, width).swapaxes(0, 1)
    _, scores = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), None, (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, s), scores)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    statistics = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=statistics)
    return constrain(logits, "logits_batch", "sequence", "head_vocab")


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A masked sum instead of a gather: it stays local where the vocabulary is split.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target_logit


def _chunk_width(b: int, s: int) -> int:
    """The widest divisor of S with at most CHUNK_TOKENS tokens of [B, width] a device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    limit = max(CHUNK_TOKENS * devices // b, 1)
    return max(width for width in range(1, s + 1) if s % width == 0 and width <= limit)

"""Greedy answers by plain recomputation of the whole sequence for every token."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moi_jax.models import rotary
from moi_jax.models.decoder import Decoder
from moi_jax.models.parameters import Tree

# Buffers grow in these steps, so that prompts of similar length share a compilation.
_LENGTH_STEP = 64


def make_greedy(
    make_model: Callable[[Tree], Decoder], stop: Sequence[int], vocab_size: int
) -> Callable[[Tree, Sequence[Sequence[int]], int], list[list[int]]]:
    """A function (parameters, prompts, max_new_tokens) -> the new tokens of each prompt.

    Args:
      make_model: parameters -> model.
      stop: ids that end an answer; they are not part of it.
      vocab_size: ids the tokenizer has; embedding rows beyond are never generated.

    As with a KV cache, the NTK factor of a prompt is kept to the end of its answer.
    """

    @jax.jit
    def generate(
        parameters: Tree, tokens: jax.Array, lengths: jax.Array, limits: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = make_model(parameters)
        shape = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        alpha = rotary.ntk_alpha(lengths, model.config.seq_length)[:, None]
        if not model.config.dynamic_ntk:
            alpha = jnp.ones_like(alpha)
        alpha = jnp.broadcast_to(alpha, shape)

        def write_next(
            carry: tuple[jax.Array, jax.Array, jax.Array],
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            tokens, ends, done = carry
            hidden = model.hidden_states(
                tokens, positions, jnp.ones(shape, jnp.int32), training=False, rope_alpha=alpha
            )
            last = jnp.take_along_axis(hidden, (ends - 1)[:, None, None], axis=1)
            logits = model.logits(last)[:, 0]
            allowed = jnp.arange(logits.shape[1]) < vocab_size
            chosen = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
            done = done | jnp.isin(chosen, jnp.asarray(stop)) | (ends >= limits)
            here = (positions == ends[:, None]) & ~done[:, None]
            tokens = jnp.where(here, chosen[:, None].astype(tokens.dtype), tokens)
            return tokens, ends + ~done, done

        start = (tokens, lengths, jnp.zeros(shape[0], bool))
        tokens, ends, _ = jax.lax.while_loop(lambda c: ~jnp.all(c[2]), write_next, start)
        return tokens, ends

    def greedy(
        parameters: Tree, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = -(-(lengths.max() + max_new_tokens) // _LENGTH_STEP) * _LENGTH_STEP
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        written, ends = jax.device_get(
            generate(parameters, tokens, lengths, lengths + max_new_tokens)
        )
        return [
            row[start:end].tolist() for row, start, end in zip(written, lengths, ends, strict=True)
        ]

    return greedy

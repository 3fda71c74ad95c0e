"""Slots of running requests on the device: prompts enter them, and all generate in step."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moi_jax.models import decoding
from moi_jax.models.decoder import Decoder, DecoderLayer, KeysAndValues
from moi_jax.models.kv_cache import Cache, insert, take_rows
from moi_jax.parallel.axes import constrain
from moi_jax.sampling.requests import Finish
from moi_jax.sampling.token_sampling import SamplingParams, sample_tokens

# Why a slot does not run any more, by the number in Slots.finish.
FINISHES: tuple[Finish, ...] = ("stop", "length", "not_finite")
STOP, LENGTH, NOT_FINITE, RUNNING = range(4)
NO_TOKEN = -1  # where a slot has no new token
# Tokens that a slot generates at most before the host looks at them.
MAX_STEPS = 16

State = tuple[jax.Array, Cache, "Slots", jax.Array]  # step, cache, slots, tokens written
T = TypeVar("T")


class Slots(NamedTuple):
    """int32[B] each, except for the sampling parameters."""

    token: jax.Array  # the newest one, not in the cache yet; NO_TOKEN after the end
    length: jax.Array  # of prompt and completion, with that token
    prompt: jax.Array  # length of the prompt alone
    limit: jax.Array  # the length at which the completion ends
    finish: jax.Array  # index into FINISHES, or RUNNING
    sampling: SamplingParams | None  # None: all slots are greedy


class Vocabulary(NamedTuple):
    """The ids that may be generated (the first `size` of them) and those that end a completion."""

    size: int
    stops: tuple[int, ...]


def empty_slots(rows: int, greedy: bool) -> Slots:
    zeros, ones = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.int32)
    sampling = SamplingParams(jnp.zeros(rows), zeros, jnp.ones(rows), jnp.zeros(rows, jnp.uint32))
    slots = Slots(zeros, ones, ones, ones, jnp.full(rows, STOP), None if greedy else sampling)
    return _replicated(slots)


def keep(cache: Cache, slots: Slots, rows: jax.Array) -> tuple[Cache, Slots]:
    """The slots `rows`, int32[m], in this order."""
    return take_rows(cache, rows), _replicated(jax.tree.map(lambda x: x[rows], slots))


def enter(
    model: Decoder,
    vocabulary: Vocabulary,
    cache: Cache,
    slots: Slots,
    rows: jax.Array,
    new: Slots,
    last: jax.Array,
    kept: Sequence[KeysAndValues],
) -> tuple[Cache, Slots]:
    """Puts prompts into slots and generates the first token of each.

    Args:
      rows: int32[m], the slots; a number that is no slot is left out.
      new: [m], with the prompt's length as `length`; `token` is not used.
      last, kept: of the prompts, as `decoding.prefill` returns them.
    """
    new = _accept(new, model.logits(last)[:, 0], vocabulary)
    cache = insert(cache, rows, kept, new.prompt)
    slots = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), slots, new)
    return cache, _replicated(slots)


def generate_tokens(
    model: Decoder,
    layers: Sequence[DecoderLayer],
    vocabulary: Vocabulary,
    cache: Cache,
    slots: Slots,
    live: jax.Array,
    steps: jax.Array,
    max_finished: jax.Array,
) -> tuple[Cache, Slots, jax.Array]:
    """Generates some more tokens in every slot.

    Args:
      model, layers: see `models.decoding.LayerViews`.
      live: bool[B]; slots that are not live generate nothing.
      steps: int32[], how many tokens, at most MAX_STEPS.
      max_finished: int32[], stop earlier when this many slots have finished.

    Returns:
      The cache, the slots, and int32[MAX_STEPS + 1, B] tokens or NO_TOKEN: first the token that
      each slot came with, then the new ones.
    """
    slots = slots._replace(finish=jnp.where(live, slots.finish, STOP))
    begun = jnp.sum(slots.finish == RUNNING)
    # A completion keeps the factor of its prompt to its end, as the reference does with its cache.
    alpha = model.rope_alpha(slots.prompt)

    def keep_going(state: State) -> jax.Array:
        step, _, slots, _ = state
        running = jnp.sum(slots.finish == RUNNING)
        return (step < steps) & (running > 0) & (begun - running < max_finished)

    def one_step(state: State) -> State:
        step, cache, slots, written = state
        logits, cache = decoding.decode(
            model, layers, jnp.maximum(slots.token, 0), slots.length, alpha, cache
        )
        slots = _accept(slots, logits, vocabulary)
        return step + 1, cache, slots, written.at[step + 1].set(slots.token)

    written = jnp.full((MAX_STEPS + 1, *slots.token.shape), NO_TOKEN).at[0].set(slots.token)
    start = (jnp.zeros((), jnp.int32), cache, slots, written)
    _, cache, slots, written = jax.lax.while_loop(keep_going, one_step, start)
    return cache, _replicated(slots), _replicated(written)


def _accept(slots: Slots, logits: jax.Array, vocabulary: Vocabulary) -> Slots:
    """The slots with the next token of those that run, from logits [B, V]."""
    logits = logits[:, : vocabulary.size]
    if slots.sampling is not None:
        # Rows are not split: sampling goes over a row many times.
        logits = constrain(logits, "batch", None)
    token = sample_tokens(logits, slots.sampling, slots.length - slots.prompt)
    running = slots.finish == RUNNING
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    stopped = jnp.isin(token, jnp.asarray(vocabulary.stops, jnp.int32))
    written = running & finite & ~stopped
    length = slots.length + written
    finish = jnp.where(length >= slots.limit, LENGTH, RUNNING)
    finish = jnp.where(stopped, STOP, finish)
    finish = jnp.where(finite, finish, NOT_FINITE)
    return slots._replace(
        token=jnp.where(written, token, NO_TOKEN),
        length=length,
        finish=jnp.where(running, finish, slots.finish),
    )


def _replicated(tree: T) -> T:
    """Replicates arrays over all devices, so that each host can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)

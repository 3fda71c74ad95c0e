"""Rows under way on the device: prompts enter, and all go on together, a token a step."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moi_jax.models.decoder import Decoder, DecoderLayer
from moi_jax.models.decoding import decode, prefill
from moi_jax.models.kv_cache import Cache, insert
from moi_jax.parallel.axes import constrain
from moi_jax.sampling.choosing import Draws, choose
from moi_jax.sampling.requests import Finish

# Why a row is not under way, by the number in Slots.finish.
FINISHES: tuple[Finish, ...] = ("stop", "length", "not_finite")
STOP, LENGTH, NOT_FINITE, RUNNING = range(4)
NOTHING = -1  # where a row has no new token
# Tokens of a row between two looks of the host.
STEPS = 16

State = tuple[jax.Array, Cache, "Slots", jax.Array]  # step, cache, slots, tokens written
T = TypeVar("T")


class Slots(NamedTuple):
    """int32[B] each, but for the draws."""

    token: jax.Array  # chosen last, and not in the cache yet; NOTHING once the answer ended
    length: jax.Array  # of prompt and answer, with that token
    prompt: jax.Array  # length of the prompt alone
    limit: jax.Array  # the length at which the answer ends
    finish: jax.Array  # index into FINISHES, or RUNNING
    draws: Draws | None  # None: all rows are greedy


class Vocabulary(NamedTuple):
    """The ids that may be chosen, the first `size`, and those that end an answer."""

    size: int
    stops: tuple[int, ...]


def empty_slots(rows: int, greedy: bool) -> Slots:
    zeros, ones = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.int32)
    draws = Draws(jnp.zeros(rows), zeros, jnp.ones(rows), jnp.zeros(rows, jnp.uint32))
    slots = Slots(zeros, ones, ones, ones, jnp.full(rows, STOP), None if greedy else draws)
    return _replicated(slots)


def fill(
    model: Decoder,
    vocabulary: Vocabulary,
    cache: Cache,
    slots: Slots,
    rows: jax.Array,
    tokens: jax.Array,
    new: Slots,
) -> tuple[Cache, Slots]:
    """Puts prompts into rows, and chooses the first token of each.

    Args:
      rows: int32[m], where; one that the slots have not is left out.
      tokens: int32[m, S], the prompts, filled up at their ends.
      new: [m], `length` being that of the prompt, `token` anything.
    """
    hidden, heads = prefill(model, tokens, new.length)
    last = jnp.take_along_axis(hidden, (new.length - 1)[:, None, None], axis=1)
    new = _accept(new, model.logits(last)[:, 0], vocabulary)
    cache = insert(cache, rows, *heads, new.prompt)
    slots = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), slots, new)
    return cache, _replicated(slots)


def advance(
    model: Decoder,
    layers: Sequence[DecoderLayer],
    vocabulary: Vocabulary,
    cache: Cache,
    slots: Slots,
    live: jax.Array,
    steps: jax.Array,
    patience: jax.Array,
) -> tuple[Cache, Slots, jax.Array]:
    """Some tokens more for every row.

    Args:
      model, layers: see `models.decoding.LayerViews`.
      live: bool[B]; the others stop before they begin.
      steps: int32[], so many tokens, at most STEPS.
      patience: int32[], fewer once so many rows have finished.

    Returns:
      The cache and the slots, and int32[STEPS + 1, B], tokens or NOTHING: those that the slots
      came with, and after them the new ones.
    """
    slots = slots._replace(finish=jnp.where(live, slots.finish, STOP))
    begun = jnp.sum(slots.finish == RUNNING)
    # An answer keeps its prompt's factor to its end, as the reference does with its cache.
    alpha = model.rope_alpha(slots.prompt)

    def goes_on(state: State) -> jax.Array:
        step, _, slots, _ = state
        running = jnp.sum(slots.finish == RUNNING)
        return (step < steps) & (running > 0) & (begun - running < patience)

    def one_step(state: State) -> State:
        step, cache, slots, written = state
        logits, cache = decode(
            model, layers, jnp.maximum(slots.token, 0), slots.length, alpha, cache
        )
        slots = _accept(slots, logits, vocabulary)
        return step + 1, cache, slots, written.at[step + 1].set(slots.token)

    written = jnp.full((STEPS + 1, *slots.token.shape), NOTHING).at[0].set(slots.token)
    start = (jnp.zeros((), jnp.int32), cache, slots, written)
    _, cache, slots, written = jax.lax.while_loop(goes_on, one_step, start)
    return cache, _replicated(slots), _replicated(written)


def _accept(slots: Slots, logits: jax.Array, vocabulary: Vocabulary) -> Slots:
    """With the next token of the rows under way, chosen from logits [B, V]."""
    logits = logits[:, : vocabulary.size]
    if slots.draws is not None:
        # Whole on a device: choosing goes over a row many times.
        logits = constrain(logits, "batch", None)
    token = choose(logits, slots.draws, slots.length - slots.prompt)
    running = slots.finish == RUNNING
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    stopped = jnp.isin(token, jnp.asarray(vocabulary.stops, jnp.int32))
    written = running & finite & ~stopped
    length = slots.length + written
    finish = jnp.where(length >= slots.limit, LENGTH, RUNNING)
    finish = jnp.where(stopped, STOP, finish)
    finish = jnp.where(finite, finish, NOT_FINITE)
    return slots._replace(
        token=jnp.where(written, token, NOTHING),
        length=length,
        finish=jnp.where(running, finish, slots.finish),
    )


def _replicated(tree: T) -> T:
    """Whole on every device, so that each host can read it."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)

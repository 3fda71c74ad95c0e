"""Slots of running requests on the device: prompts enter them, and all generate in step."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moi_jax.models import decoding
from moi_jax.models.decoder import Decoder, DecoderLayer, KeysAndValues
from moi_jax.models.kv_cache import Cache, fit_length, insert, take_rows
from moi_jax.models.kv_cache import resize as resize_cache
from moi_jax.parallel.axes import constrain
from moi_jax.sampling.drafts import look_up
from moi_jax.sampling.requests import Finish
from moi_jax.sampling.token_sampling import SamplingParams, sample_tokens

# Why a slot does not run any more, by the number in Slots.finish.
FINISHES: tuple[Finish, ...] = ("stop", "length", "not_finite")
STOP, LENGTH, NOT_FINITE, RUNNING = range(4)

State = tuple[jax.Array, Cache, "Slots", "Guesses"]  # the first is the step
T = TypeVar("T")


class Slots(NamedTuple):
    """int32[B] each, except for the tokens and the sampling parameters."""

    tokens: jax.Array  # int32[B, T], prompt and completion
    length: jax.Array  # of prompt and completion; the last token is not in the cache yet
    prompt: jax.Array  # length of the prompt alone
    limit: jax.Array  # the length at which the completion ends
    finish: jax.Array  # index into FINISHES, or RUNNING
    sampling: SamplingParams | None  # None: all slots are greedy


class Guesses(NamedTuple):
    """How often the first guess of a row at its next token was right."""

    right: jax.Array  # int32[]
    made: jax.Array  # int32[]


class Vocabulary(NamedTuple):
    """The ids that may be generated (the first `size` of them) and those that end a completion."""

    size: int
    stops: tuple[int, ...]


def empty_slots(rows: int, length: int, greedy: bool) -> Slots:
    zeros, ones = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.int32)
    sampling = SamplingParams(jnp.zeros(rows), zeros, jnp.ones(rows), jnp.zeros(rows, jnp.uint32))
    tokens, stopped = jnp.zeros((rows, length), jnp.int32), jnp.full(rows, STOP)
    return _replicated(Slots(tokens, ones, ones, ones, stopped, None if greedy else sampling))


def resize(cache: Cache, slots: Slots, length: int) -> tuple[Cache, Slots]:
    """Makes room for `length` tokens in every slot; no running one may be longer."""
    tokens = fit_length(slots.tokens, length, 1)
    return resize_cache(cache, length), _replicated(slots._replace(tokens=tokens))


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
      new: [m], with tokens [m, S] and the prompt's length as `length`.
      last, kept: of the prompts, as `decoding.prefill` returns them.
    """
    new = new._replace(tokens=fit_length(new.tokens, slots.tokens.shape[1], 1))
    no_guess = jnp.zeros((len(rows), 1), jnp.int32)
    new, _ = _extend(new, model.logits(last), no_guess, vocabulary)
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
    drafts: int,
) -> tuple[Cache, Slots, Guesses]:
    """Generates some more tokens in every slot.

    Args:
      model, layers: see `models.decoding.LayerViews`.
      live: bool[B]; slots that are not live generate nothing.
      steps: int32[].
      max_finished: int32[], stop earlier when this many slots have finished.
      drafts: guesses at tokens that a step tries (`sampling.drafts`). A step adds 1 to 1 + drafts
        tokens; those that are past a slot's limit or the cache are not used. Without drafts,
        guesses are only counted.
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
        step, cache, slots, counts = state
        guesses = look_up(slots.tokens, slots.length, max(1, drafts))
        newest = jnp.take_along_axis(slots.tokens, slots.length[:, None] - 1, axis=1)
        tokens = jnp.concatenate([newest, guesses[:, :drafts]], axis=1)
        logits, cache = decoding.decode(model, layers, tokens, slots.length, alpha, cache)
        slots, more = _extend(slots, logits, guesses, vocabulary)
        return step + 1, cache, slots, jax.tree.map(jnp.add, counts, more)

    none = jnp.zeros((), jnp.int32)
    start = (none, cache, slots, Guesses(none, none))
    _, cache, slots, counts = jax.lax.while_loop(keep_going, one_step, start)
    return cache, _replicated(slots), _replicated(counts)


def _extend(
    slots: Slots, logits: jax.Array, guesses: jax.Array, vocabulary: Vocabulary
) -> tuple[Slots, Guesses]:
    """The slots with the next tokens of those that run, up to the first that was guessed wrong.

    Args:
      logits: [B, W, V], after the newest token and after each of W - 1 guesses.
      guesses: int32[B, n], at the first n tokens; n is at least 1.
    """
    active = slots.finish == RUNNING
    made, right = jnp.sum(active), []
    for number in range(logits.shape[1]):
        slots, token = _accept(slots, logits[:, number], active, vocabulary)
        if number < guesses.shape[1]:
            active &= (slots.finish == RUNNING) & (token == guesses[:, number])
            right.append(jnp.sum(active))
    return slots, Guesses(right[0], made)


def _accept(
    slots: Slots, logits: jax.Array, active: jax.Array, vocabulary: Vocabulary
) -> tuple[Slots, jax.Array]:
    """The slots with one more token where they are active, and that token, from logits [B, V]."""
    logits = logits[:, : vocabulary.size]
    if slots.sampling is not None:
        # Rows are not split: sampling goes over a row many times.
        logits = constrain(logits, "batch", None)
    token = sample_tokens(logits, slots.sampling, slots.length - slots.prompt)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    stopped = jnp.isin(token, jnp.asarray(vocabulary.stops, jnp.int32))
    written = active & finite & ~stopped
    here = jnp.arange(slots.tokens.shape[1]) == slots.length[:, None]
    length = slots.length + written
    finish = jnp.where(length >= slots.limit, LENGTH, RUNNING)
    finish = jnp.where(stopped, STOP, finish)
    finish = jnp.where(finite, finish, NOT_FINITE)
    more = slots._replace(
        tokens=jnp.where(here & written[:, None], token[:, None], slots.tokens),
        length=length,
        finish=jnp.where(active, finish, slots.finish),
    )
    return more, token


def _replicated(tree: T) -> T:
    """Replicates arrays over all devices, so that each host can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)

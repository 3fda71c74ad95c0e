"""Answers to many requests: a slot for each under way, refilled as soon as one is done."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moi_jax.errors import UserError
from moi_jax.models import axes
from moi_jax.models.cache import AXES, Cache, cache_shape, empty_cache, resize
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Decoder
from moi_jax.models.decoding import unstack
from moi_jax.models.parameters import Tree, abstract_parameters
from moi_jax.sampling.answer import Answer
from moi_jax.sampling.choosing import Draws
from moi_jax.sampling.requests import Completion, Request
from moi_jax.sampling.slots import (
    FINISHES,
    NOTHING,
    RUNNING,
    STEPS,
    Slots,
    Vocabulary,
    advance,
    empty_slots,
    fill,
)

# The same where someone reads the text as it comes.
STEPS_READ = 4
# Widths of prompts and lengths of the cache are this times a power of two, or the most that the
# run needs: few shapes to compile.
SHORTEST = 64
# Tokens of prompts that are computed at once: the scores of their attention are S x S.
PREFILL_TOKENS = 4096


class Sampler:
    """Batched generation with a KV cache.

    Attributes:
      slots: answers under way at once.
      context: tokens that prompt and answer may have together.
    """

    def __init__(
        self,
        make_model: Callable[[Tree], Decoder],
        config: ModelConfig,
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
        decode: Callable[[Sequence[int]], str],
        slots: int = 16,
        context: int | None = None,
        mesh: Mesh | None = None,
    ):
        """
        Args:
          make_model: parameters -> model.
          stop_ids: each ends an answer, and is not part of it.
          vocab_size: ids the tokenizer has; embedding rows beyond are never generated.
          decode: ids -> text.
          slots: rounded up to a multiple of the mesh's batch shards.
          context: None is the model's seq_length.
          mesh: the one that the parameters lie on; None is one device.
        """
        self._config, self._decode, self._mesh = config, decode, mesh
        self._shape = dict(mesh.shape) if mesh is not None else {}
        self._shards = math.prod(self._shape.get(axis, 1) for axis in axes.RULES["batch"])
        self.slots = -(-slots // self._shards) * self._shards
        self.context = context or config.seq_length
        vocabulary = Vocabulary(vocab_size, tuple(stop_ids))
        self._dtype = jax.eval_shape(
            lambda parameters: jnp.zeros((), make_model(parameters).compute_dtype),
            abstract_parameters(config, jnp.float32),
        ).dtype

        def new(length: int) -> tuple[Cache, Slots]:
            cache = empty_cache(config, self.slots, length, self._dtype)
            return cache, empty_slots(self.slots)

        self._unstack = jax.jit(lambda parameters: unstack(config, parameters, self._dtype))
        self._new = jax.jit(new, static_argnums=0)
        self._resize = jax.jit(resize, static_argnums=1)
        self._fill = jax.jit(
            lambda parameters, *given: fill(make_model(parameters), vocabulary, *given),
            donate_argnums=(1, 2),
        )
        self._advance = jax.jit(
            lambda layers, *given: advance(make_model(layers), vocabulary, *given),
            donate_argnums=(1, 2),
        )

    @property
    def cache_bytes(self) -> int:
        """Of the cache on each device where answers reach to the end of the context.

        A run takes no more than its longest request needs.
        """
        return self._bytes(self.context)

    def run(
        self,
        parameters: Tree,
        requests: Sequence[Request],
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """The answers, each with the index of its request, in the order they are finished.

        Besides the cache a run holds the layers' parameters once more, in the compute dtype.

        Args:
          parameters: of the model, as `make_model` takes them.
          on_text: told a request's index and new text of its answer, once that text is certain:
            no part of a stop string or of an unfinished character.

        Raises:
          UserError: a prompt is empty, or the cache does not fit the device.
        """
        waiting: deque[tuple[int, _Row]] = deque()
        for index, request in enumerate(requests):
            length = len(request.prompt)
            if not length:
                raise UserError(f"request {index} has an empty prompt; it needs a token at least")
            if length >= self.context:
                yield index, Completion((), "", "too_long")
            elif request.max_new_tokens < 1:
                yield index, Completion((), "", "length")
            else:
                limit = min(length + request.max_new_tokens, self.context)
                told = partial(on_text, index) if on_text else None
                waiting.append((index, _Row(request, limit, Answer(request, self._decode, told))))
        if not waiting:
            return
        longest = max(row.limit for _, row in waiting)
        longest = min(-(-longest // SHORTEST) * SHORTEST, self.context)
        steps = STEPS_READ if on_text else STEPS
        with self._on_mesh():
            layers = self._unstack(parameters)
            self._check_memory(longest)
            cache, slots = self._new(min(SHORTEST, longest))

        rows: dict[int, tuple[int, _Row]] = {}  # slot -> the request's index, and its row
        while waiting or rows:
            free = (slot for slot in range(self.slots) if slot not in rows)
            fresh = {slot: waiting.popleft() for slot in islice(free, len(waiting))}
            rows |= fresh
            reach = max(min(row.length + steps, row.limit) for _, row in rows.values())
            first: list[tuple[list[int], jax.Array]] = []
            with self._on_mesh():
                if cache.length != _bucket(reach, longest):
                    cache = self._resize(cache, _bucket(reach, longest))
                for prompts in self._prompts({slot: row for slot, (_, row) in fresh.items()}):
                    cache, slots, tokens = self._fill(parameters, cache, slots, *prompts)
                    first.append((prompts[0].tolist(), tokens))
                live = np.isin(np.arange(self.slots), list(rows))
                patience = max(self.slots // 16, 1) if waiting else self.slots
                limits = np.array((steps, patience), np.int32)
                cache, slots, later = self._advance(layers, cache, slots, live, *limits)
                first, later, finish = jax.device_get((first, later, slots.finish))
            written = {slot: later[:, slot] for slot in rows}
            for places, tokens in first:
                for slot, token in zip(places, tokens, strict=True):
                    if slot in written:
                        written[slot] = np.append(token, written[slot])
            for slot, (index, row) in sorted(rows.items()):
                tokens = written[slot]
                stopped = row.answer.add(tokens[tokens != NOTHING].tolist())
                if stopped or finish[slot] != RUNNING:
                    del rows[slot]
                    yield index, row.answer.finished("stop" if stopped else FINISHES[finish[slot]])

    def _prompts(self, fresh: dict[int, "_Row"]) -> Iterator[tuple[np.ndarray, np.ndarray, Slots]]:
        """The arguments of `fill`, a few shapes of them, for the prompts of these slots."""
        if not fresh:
            return
        width = _bucket(max(len(row.request.prompt) for row in fresh.values()), self.context)
        most = max(PREFILL_TOKENS // width, self._shards)
        places = list(fresh)
        for group in (places[n : n + most] for n in range(0, len(places), most)):
            count = self._shards
            while count < len(group):
                count *= 2
            tokens = np.zeros((count, width), np.int32)
            for line, slot in zip(tokens, group, strict=False):
                prompt = fresh[slot].request.prompt
                line[: len(prompt)] = prompt
            chosen = [fresh[slot] for slot in group]
            spare = [self.slots] * (count - len(group))
            yield np.array(group + spare, np.int32), tokens, _slots(chosen, count)

    def _on_mesh(self) -> AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh is not None else nullcontext()

    def _bytes(self, length: int) -> int:
        """Of a cache of this length on each device."""
        shape = cache_shape(self._config, self.slots, length)
        spec = axes.partition_spec(AXES, shape, self._shape)
        parts = math.prod(self._shape[axis] for split in spec for axis in split or ())
        return 2 * self._config.num_layers * math.prod(shape) * self._dtype.itemsize // parts

    def _check_memory(self, length: int) -> None:
        """Raises UserError when a cache of this length evidently has no room on a device."""
        devices = self._mesh.local_devices if self._mesh is not None else jax.local_devices()[:1]
        for device in devices:
            memory = device.memory_stats() or {}
            if {"bytes_limit", "bytes_in_use"} <= memory.keys():
                free = memory["bytes_limit"] - memory["bytes_in_use"]
                if self._bytes(length) > free:
                    raise UserError(
                        f"the KV cache of {self.slots} slots of {length} tokens takes "
                        f"{self._bytes(length) / 2**30:.1f} GiB on {device}, where "
                        f"{free / 2**30:.1f} GiB are free; lower slots, context or "
                        f"max_new_tokens"
                    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A request on its way."""

    request: Request
    limit: int  # tokens of prompt and answer at most
    answer: Answer

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.answer.tokens)


def _slots(rows: Sequence[_Row], count: int) -> Slots:
    """What `fill` is told of so many rows; those past the last are of a single token."""

    def column(dtype: DTypeLike, values: Iterable[float], otherwise: float) -> Any:
        return np.fromiter(chain(values, repeat(otherwise)), dtype, count)

    requests = [row.request for row in rows]
    lengths = column(np.int32, (len(r.prompt) for r in requests), 1)
    return Slots(
        token=column(np.int32, (), 0),
        length=lengths,
        prompt=lengths,
        limit=column(np.int32, (row.limit for row in rows), 1),
        finish=column(np.int32, (), RUNNING),
        draws=Draws(
            temperature=column(np.float32, (r.temperature for r in requests), 0),
            top_k=column(np.int32, (r.top_k for r in requests), 0),
            top_p=column(np.float32, (r.top_p for r in requests), 1),
            seed=column(np.uint32, (r.seed % 2**32 for r in requests), 0),
        ),
    )


def _bucket(length: int, most: int) -> int:
    """The next of SHORTEST times a power of two, at most `most`."""
    return min(SHORTEST << (-(-length // SHORTEST) - 1).bit_length(), most)

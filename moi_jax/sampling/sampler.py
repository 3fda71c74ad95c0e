"""Answers to many requests: a slot for each under way, refilled as soon as one is done."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich import filesize

from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind
from moi_jax.models.decoding import unstack
from moi_jax.models.kv_cache import AXES, Cache, cache_shape, empty_cache, resize
from moi_jax.models.parameters import Tree, abstract_parameters, declare
from moi_jax.parallel.placing import batch_shards, bucket, named_sharding, round_up
from moi_jax.sampling.answer import Answer
from moi_jax.sampling.requests import Completion, Finish, Request
from moi_jax.sampling.rows import Row, prompt_batches
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
from moi_jax.text.tokenizer import Tokenizer

# The same where someone reads the text as it comes.
STEPS_READ = 4
# The cache has this length times a power of two, or that of the context.
SHORTEST_CACHE = 128


class Sampler:
    """Batched generation with a KV cache.

    Attributes:
      slots: answers under way at once.
      context: tokens that prompt and answer may have together.
    """

    def __init__(
        self,
        bind: Bind,
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
          bind: parameters -> model.
          stop_ids: each ends an answer, and is not part of it.
          vocab_size: ids the tokenizer has; embedding rows beyond are never generated.
          decode: ids -> text.
          slots: rounded up to a multiple of the mesh's batch shards.
          context: None is the model's seq_length.
          mesh: the one that the parameters lie on; None is one device.
        """
        self._config, self._decode, self._mesh = config, decode, mesh
        self._shards = batch_shards(mesh)
        self.slots = round_up(slots, mesh)
        self.context = config.seq_length if context is None else context
        vocabulary = Vocabulary(vocab_size, tuple(stop_ids))
        self._dtype = jax.eval_shape(
            lambda parameters: jnp.zeros((), bind(parameters).compute_dtype),
            abstract_parameters(config, jnp.float32),
        ).dtype

        def new(rows: int, length: int, greedy: bool) -> tuple[Cache, Slots]:
            return empty_cache(config, rows, length, self._dtype), empty_slots(rows, greedy)

        self._unstack = jax.jit(lambda parameters: unstack(config, parameters, self._dtype))
        self._new = jax.jit(new, static_argnums=(0, 1, 2))
        self._resize = jax.jit(resize, static_argnums=1)
        self._fill = jax.jit(
            lambda parameters, *given: fill(bind(parameters), vocabulary, *given),
            donate_argnums=(1, 2),
        )
        self._advance = jax.jit(
            lambda layers, *given: advance(bind(layers), vocabulary, *given),
            donate_argnums=(1, 2),
        )

    @property
    def cache_bytes(self) -> int:
        """Of the cache on each device, every slot taken and to the end of the context.

        A run takes what its own requests need at the time; while the cache grows the shorter one
        is there too.
        """
        return self._bytes(self.slots, self.context)

    def describe(self) -> str:
        """What the cache takes, to be told before anything is allocated."""
        devices = 1 if self._mesh is None else self._mesh.size
        size = filesize.decimal(self.cache_bytes)
        each = f" on each of {devices} devices" if devices > 1 else ""
        return (
            f"cache of {self.slots} x {self.context:,} tokens: at most {size}{each}, and "
            f"{filesize.decimal(self._layers_bytes())} for the layers' weights once more"
        )

    def run(
        self,
        parameters: Tree,
        requests: Sequence[Request],
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """The answers, each with the index of its request, in the order they are finished.

        Besides the cache a run holds the layers' parameters once more, in the compute dtype.

        Args:
          parameters: of the model, as `bind` takes them.
          on_text: told a request's index and new text of its answer, once that text is certain:
            no part of a stop string or of an unfinished character.

        Raises:
          UserError: a prompt is empty, or the cache does not fit the device.
        """
        waiting: deque[Row] = deque()
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
                waiting.append(Row(index, request, limit, Answer(request, self._decode, told)))
        if not waiting:
            return
        longest = self._ring(max(row.limit for row in waiting))
        count = bucket(len(waiting), self._shards, self.slots)
        greedy = all(row.request.temperature <= 0 for row in waiting)
        self._check_memory(count, longest)
        with self._on_mesh():
            layers = self._unstack(parameters)
            cache, slots = self._new(count, min(SHORTEST_CACHE, longest), greedy)

        steps = STEPS_READ if on_text else STEPS
        rows: dict[int, Row] = {}  # by their slots
        while waiting or rows:
            free = (slot for slot in range(count) if slot not in rows)
            fresh = {slot: waiting.popleft() for slot in islice(free, len(waiting))}
            rows |= fresh
            reach = max(min(row.length + steps, row.limit) for row in rows.values())
            patience = count // 16 + 1 if waiting else count
            with self._on_mesh():
                if cache.length != self._ring(reach):
                    cache = self._resize(cache, self._ring(reach))
                for prompts in prompt_batches(fresh, self._shards, count, greedy, self.context):
                    cache, slots = self._fill(parameters, cache, slots, *prompts)
                live = np.isin(np.arange(count), list(rows))
                cache, slots, written = self._advance(
                    layers, cache, slots, live, np.int32(steps), np.int32(patience)
                )
                written, finish = jax.device_get((written, slots.finish))
            for slot, row in list(rows.items()):
                tokens = written[0 if slot in fresh else 1 :, slot]
                stopped = row.answer.add(tokens[tokens != NOTHING].tolist())
                if stopped or finish[slot] != RUNNING:
                    del rows[slot]
                    reason: Finish = "stop" if stopped else FINISHES[finish[slot]]
                    yield row.index, row.answer.finished(reason)

    def _ring(self, tokens: int) -> int:
        """The length of a cache that holds so many; a few lengths, so few shapes to compile."""
        return bucket(tokens, SHORTEST_CACHE, self.context)

    def _on_mesh(self) -> AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh is not None else nullcontext()

    def _bytes(self, rows: int, length: int) -> int:
        """Of a cache of so many rows of this length, on each device."""
        layer = self._elements(cache_shape(self._config, rows, length), AXES)
        return 2 * self._config.num_layers * layer * self._dtype.itemsize

    def _layers_bytes(self) -> int:
        """Of the layers' parameters in the compute dtype, on each device."""
        layers = [p for path, p in declare(self._config).items() if path.startswith("layers.")]
        return sum(self._elements(p.shape, p.axes) for p in layers) * self._dtype.itemsize

    def _elements(self, shape: tuple[int, ...], names: Sequence[str | None]) -> int:
        """Of an array with these logical axes, on each device."""
        if self._mesh is None:
            return math.prod(shape)
        return math.prod(named_sharding(names, shape, self._mesh).shard_shape(shape))

    def _check_memory(self, rows: int, length: int) -> None:
        """Raises UserError when cache and layers evidently have no room on a device."""
        # While a cache grows the one of half its length is there too.
        cache = self._bytes(rows, length) + self._bytes(rows, length // 2)
        needed = cache + self._layers_bytes()
        devices = self._mesh.local_devices if self._mesh is not None else jax.local_devices()[:1]
        for device in devices:
            memory = device.memory_stats() or {}
            if {"bytes_limit", "bytes_in_use"} <= memory.keys():
                free = memory["bytes_limit"] - memory["bytes_in_use"]
                if needed > free:
                    raise UserError(
                        f"{rows} answers of up to {length} tokens need a KV cache of "
                        f"{cache / 2**30:.1f} GiB, and the layers' weights once more "
                        f"{self._layers_bytes() / 2**30:.1f} GiB; {device} has {free / 2**30:.1f} "
                        f"GiB free. Lower slots, context or max_new_tokens"
                    )


def make_sampler(
    bind: Bind,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    slots: int = 16,
    context: int | None = None,
    mesh: Mesh | None = None,
) -> Sampler:
    """A sampler that stops where the tokenizer's chat template does."""
    return Sampler(
        bind,
        config,
        stop_ids=tokenizer.template.stops,
        vocab_size=tokenizer.vocab_size,
        decode=tokenizer.decode,
        slots=slots,
        context=context,
        mesh=mesh,
    )

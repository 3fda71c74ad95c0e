"""Completions of many requests: each runs in a slot, which is refilled as soon as one is done."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moi_jax.common.errors import UserError
from moi_jax.models import decoding
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.decoding import BoundPrograms, LayerPrograms, LayerViews, view_layers
from moi_jax.models.kv_cache import Cache, empty_cache
from moi_jax.models.parameters import abstract_parameters
from moi_jax.parallel.placing import batch_shards, round_up
from moi_jax.parallel.stuck import limited_batch
from moi_jax.sampling.memory import CacheMemory
from moi_jax.sampling.prompt_batches import RunningRequest, prefill_batches
from moi_jax.sampling.requests import Completion, Finish, Request
from moi_jax.sampling.slots import (
    FINISHES,
    RUNNING,
    Slots,
    Vocabulary,
    empty_slots,
    enter,
    generate_tokens,
    keep,
    resize,
)
from moi_jax.sampling.text_stream import TextStream
from moi_jax.text.tokenizer import Tokenizer

# Steps before the host looks at the tokens, and where the text is read while it is generated.
STEPS, STREAMING_STEPS = 16, 4
# Guesses at the next tokens that a step tries, see `sampling.drafts`.
DRAFT_TOKENS = 3
# It tries them while at least this share of the first guesses is right. With fewer, steps that take
# longer cost more than they save, on a CPU at least.
WORTHWHILE = 1 / 3


class Sampler:
    """Batched generation with a KV cache (continuous batching).

    Attributes:
      slots: how many requests run at a time.
      context: tokens that a prompt and its completion may have together.
      draft_tokens: guesses at the next tokens that a greedy step tries while they are often right.
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
        draft_tokens: int = DRAFT_TOKENS,
        mesh: Mesh | None = None,
    ):
        """
        Args:
          bind: parameters -> model.
          stop_ids: ids that end a completion; they are not part of it.
          vocab_size: the tokenizer's; embedding rows beyond it are never generated.
          decode: ids -> text.
          slots: rounded up to a multiple of the mesh's batch shards.
          context: None means the model's seq_length.
          mesh: where the parameters are laid out; None is one device.
        """
        self._decode, self._mesh = decode, mesh
        self._shards = batch_shards(mesh)
        self.slots = round_up(slots, mesh)
        self.context = config.seq_length if context is None else context
        self.draft_tokens = draft_tokens
        vocabulary = Vocabulary(vocab_size, tuple(stop_ids))
        self._dtype = jax.eval_shape(
            lambda parameters: jnp.zeros((), bind(parameters).compute.dtype),
            abstract_parameters(config, jnp.float32),
        ).dtype

        self._memory = CacheMemory(
            config, self._dtype, mesh, slots=self.slots, context=self.context
        )

        def new(rows: int, length: int, greedy: bool) -> tuple[Cache, Slots]:
            return empty_cache(config, rows, length, self._dtype), empty_slots(rows, length, greedy)

        self._view_layers = jax.jit(lambda parameters: view_layers(config, parameters, self._dtype))
        self._new = jax.jit(new, static_argnums=(0, 1, 2))
        self._resize = jax.jit(resize, static_argnums=2)
        self._programs = LayerPrograms(bind, config)
        names = self._programs.names
        self._keep = jax.jit(keep)
        self._enter = jax.jit(
            lambda outer, *given: enter(bind({**names, **outer}), vocabulary, *given),
            donate_argnums=(1, 2),
        )

        def generate(views: LayerViews, *given: Any) -> Any:
            return generate_tokens(*views.bind(bind, names), vocabulary, *given)

        self._generate = jax.jit(generate, donate_argnums=(1, 2), static_argnums=6)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the largest cache on each device: all slots taken, up to the end of the context.

        A run takes only what its requests need at the time. While the cache grows, the shorter
        one takes memory too.
        """
        return self._memory.bytes(*self._memory.largest())

    def describe(self, parameters: Tree | LayerViews, requests: Sequence[Request] = ()) -> str:
        """The memory that a run allocates in words, for a message before that.

        Args:
          requests: of the run; without them the figure is that of the largest possible cache.
        """
        limits = [self._limit(one) for one in requests if self._fits(one)] if requests else None
        return self._memory.describe(parameters, limits)

    def run(
        self,
        parameters: Tree | LayerViews,
        requests: Sequence[Request],
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Yields (index of the request, its completion) in the order in which they finish.

        Args:
          parameters: the model's, as `bind` takes them; then a run holds them a second time, layer
            by layer and in the compute dtype. `LayerViews` are used as they are.
          on_text: called with a request's index and new text as soon as no later token can change
            that text.

        Raises:
          UserError: a prompt is empty, or the cache does not fit the device.
        """
        empty, waiting = self._sorted(requests, on_text)
        yield from empty
        if not waiting:
            return
        count, longest = self._memory.largest([one.limit for one in waiting])
        greedy = all(one.request.temperature <= 0 for one in waiting)
        self._memory.check(count, longest, parameters)
        with self._on_mesh():
            views = self._views(parameters)
            cache, slots = self._new(count, self._memory.length(1), greedy)
        steps = STREAMING_STEPS if on_text else STEPS
        running: dict[int, RunningRequest] = {}  # by their slots
        drafts = self.draft_tokens if greedy else 0
        # Tokens if all guesses are right, and the first one of a fresh request.
        most = 1 + steps * (1 + drafts)
        while waiting or running:
            if not waiting and (fewer := self._fewer(len(running), count)):
                count, kept = fewer, _padded(list(running), fewer)
                running = dict(enumerate(running.values()))
                with self._on_mesh():
                    cache, slots = self._keep(cache, slots, kept)
            free = (slot for slot in range(count) if slot not in running)
            fresh = {slot: waiting.popleft() for slot in islice(free, len(waiting))}
            running |= fresh
            max_finished = count // 16 + 1 if waiting else count
            with limited_batch(), self._on_mesh():
                cache, slots = self._admit(views, cache, slots, running, fresh, most, greedy)
                live = np.isin(np.arange(count), list(running))
                cache, slots, guesses = self._generate(
                    views, cache, slots, live, np.int32(steps), np.int32(max_finished), drafts
                )
                tokens, lengths, finish, guesses = jax.device_get(
                    (slots.tokens, slots.length, slots.finish, guesses)
                )
            if greedy:
                often_right = guesses.right >= WORTHWHILE * guesses.made
                drafts = self.draft_tokens if often_right else 0
            for slot, one in list(running.items()):
                stopped = one.stream.add(tokens[slot, one.length : lengths[slot]].tolist())
                if stopped or finish[slot] != RUNNING:
                    del running[slot]
                    reason: Finish = "stop" if stopped else FINISHES[finish[slot]]
                    yield one.index, one.stream.complete(reason)

    def _sorted(
        self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None
    ) -> tuple[list[tuple[int, Completion]], deque[RunningRequest]]:
        """Returns the completions of requests that get no token, and the others, longest first.

        Rows of similar length then run together, which a cache of one length for all suits best.
        """
        empty: list[tuple[int, Completion]] = []
        waiting: list[RunningRequest] = []
        for index, request in enumerate(requests):
            if not request.prompt:
                raise UserError(f"request {index} has an empty prompt; it needs at least one token")
            if not self._fits(request):
                empty.append((index, Completion((), "", "too_long")))
            elif request.max_new_tokens < 1:
                empty.append((index, Completion((), "", "length")))
            else:
                show = partial(on_text, index) if on_text else None
                stream = TextStream(request, self._decode, show)
                waiting.append(RunningRequest(index, request, self._limit(request), stream))
        return empty, deque(sorted(waiting, key=lambda one: one.limit, reverse=True))

    def _admit(
        self,
        views: LayerViews,
        cache: Cache,
        slots: Slots,
        running: Mapping[int, RunningRequest],
        fresh: Mapping[int, RunningRequest],
        most: int,
        greedy: bool,
    ) -> tuple[Cache, Slots]:
        """Makes room for `most` more tokens of all running requests, and enters the fresh ones."""
        reach = max(min(one.length + most, one.limit) for one in running.values())
        if cache.length != (length := self._memory.length(reach)):
            cache, slots = self._resize(cache, slots, length)
        count = slots.length.shape[0]
        for rows, new in prefill_batches(fresh, self._shards, count, greedy, self.context):
            bound = BoundPrograms(self._programs, views)
            prompts = decoding.prefill(bound, new.tokens, new.length)
            cache, slots = self._enter(views.outer, cache, slots, rows, new, *prompts)
        return cache, slots

    def _fewer(self, running: int, count: int) -> int:
        """The number of slots for the last requests, a quarter of `count`; 0 while more run.

        Every number of slots is a program of its own, so there are few.
        """
        fewer = round_up(count // 4, self._mesh)
        return fewer if running and running <= fewer < count else 0

    def _views(self, parameters: Tree | LayerViews) -> LayerViews:
        if isinstance(parameters, LayerViews):
            return parameters
        return self._view_layers(parameters)

    def _fits(self, request: Request) -> bool:
        """Whether the context has room for an answer."""
        return len(request.prompt) < self.context

    def _limit(self, request: Request) -> int:
        """The most tokens that prompt and completion may have together."""
        return min(len(request.prompt) + request.max_new_tokens, self.context)

    def _on_mesh(self) -> AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh is not None else nullcontext()


def _padded(rows: Sequence[int], count: int) -> np.ndarray:
    """int32[count]: the rows, and the first of them as often as is needed."""
    return np.array([*rows, *[rows[0]] * (count - len(rows))], np.int32)


def make_sampler(
    bind: Bind,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    slots: int = 16,
    context: int | None = None,
    mesh: Mesh | None = None,
) -> Sampler:
    """A sampler that stops where the tokenizer's chat template ends a turn."""
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

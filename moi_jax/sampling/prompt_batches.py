"""Running requests on the host, and their prompts as batches of a few shapes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from moi_jax.parallel.placing import length_bucket
from moi_jax.sampling.requests import Request
from moi_jax.sampling.slots import RUNNING, Slots
from moi_jax.sampling.text_stream import TextStream
from moi_jax.sampling.token_sampling import SamplingParams

# Tokens of the prompts in one batch: the scores of their attention are S x S.
PREFILL_TOKENS = 4096
SHORTEST_PROMPT = 64


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that has a slot, or waits for one.

    Attributes:
      limit: the most tokens that prompt and completion may have together.
    """

    index: int
    request: Request
    limit: int
    stream: TextStream

    @property
    def length(self) -> int:
        """Tokens of prompt and completion so far."""
        return len(self.request.prompt) + len(self.stream.tokens)


def prefill_batches(
    requests: Mapping[int, RunningRequest], multiple: int, slots: int, greedy: bool, context: int
) -> Iterator[tuple[np.ndarray, Slots]]:
    """Yields (slots, new), what `slots.enter` needs; new.tokens are those of `decoding.prefill`.

    Prompts of similar length are together. There are few widths, see `length_bucket`, and numbers
    of rows are a power of two times `multiple`, so few shapes are compiled.

    Args:
      requests: by their slots.
      multiple: each batch has a multiple of this many rows.
      slots: the number of slots; a padding row is sent to this number, which is no slot.
      context: the longest possible prompt.
    """
    by_width = defaultdict(list)
    for slot, running in requests.items():
        length = len(running.request.prompt)
        by_width[length_bucket(length, SHORTEST_PROMPT, context)].append(slot)
    for width, taken in by_width.items():
        for group, count in _groups(taken, multiple, PREFILL_TOKENS // width):
            tokens = np.zeros((count, width), np.int32)
            for line, slot in zip(tokens, group, strict=False):
                prompt = requests[slot].request.prompt
                line[: len(prompt)] = prompt
            nowhere = [slots] * (count - len(group))
            new = _slots([requests[slot] for slot in group], tokens, greedy)
            yield np.array(group + nowhere, np.int32), new


def _groups(taken: list[int], multiple: int, most: int) -> Iterator[tuple[list[int], int]]:
    """Splits slots into groups that need no padding rows, unless fewer than `multiple` are left.

    Yields:
      A group, and its number of rows: `multiple` times a power of two, and no more than `most`
      unless that is `multiple`.
    """
    while taken:
        count = multiple
        while 2 * count <= min(len(taken), most):
            count *= 2
        yield taken[:count], count
        taken = taken[count:]


def _slots(running: Sequence[RunningRequest], tokens: Any, greedy: bool) -> Slots:
    """The slots of these requests, padded to the rows of `tokens` with slots of a single token."""
    count = len(tokens)

    def column(dtype: DTypeLike, values: Iterable[float], otherwise: float) -> Any:
        return np.fromiter(chain(values, repeat(otherwise)), dtype, count)

    requests = [one.request for one in running]
    lengths = column(np.int32, (len(r.prompt) for r in requests), 1)
    sampling = SamplingParams(
        temperature=column(np.float32, (r.temperature for r in requests), 0),
        top_k=column(np.int32, (r.top_k for r in requests), 0),
        top_p=column(np.float32, (r.top_p for r in requests), 1),
        seed=column(np.uint32, (r.seed % 2**32 for r in requests), 0),
    )
    return Slots(
        tokens=tokens,
        length=lengths,
        prompt=lengths,
        limit=column(np.int32, (one.limit for one in running), 1),
        finish=column(np.int32, (), RUNNING),
        sampling=None if greedy else sampling,
    )

"""Requests under way on the host, and their prompts as arrays of a few shapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from moi_jax.parallel.placing import bucket
from moi_jax.sampling.answer import Answer
from moi_jax.sampling.choosing import Draws
from moi_jax.sampling.requests import Request
from moi_jax.sampling.slots import RUNNING, Slots

# Tokens of prompts that are computed at once: the scores of their attention are S x S.
PREFILL_TOKENS = 4096
SHORTEST_PROMPT = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A request on its way."""

    index: int
    request: Request
    limit: int  # tokens of prompt and answer at most
    answer: Answer

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.answer.tokens)


def prompt_batches(
    rows: Mapping[int, Row], multiple: int, slots: int, greedy: bool, context: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Slots]]:
    """What `slots.fill` needs to put these rows into their slots.

    Widths, and numbers of rows, are a power of two times the least: few shapes to compile.

    Args:
      multiple: divides the rows of each batch.
      slots: how many there are; rows that fill up a batch are said to go where there is none.
      context: no prompt is longer.
    """
    longest = max((len(row.request.prompt) for row in rows.values()), default=0)
    width = bucket(longest, SHORTEST_PROMPT, context)
    most = max(PREFILL_TOKENS // width, multiple)
    places = list(rows)
    for group in (places[n : n + most] for n in range(0, len(places), most)):
        count = bucket(len(group), multiple)
        tokens = np.zeros((count, width), np.int32)
        for line, slot in zip(tokens, group, strict=False):
            prompt = rows[slot].request.prompt
            line[: len(prompt)] = prompt
        nowhere = [slots] * (count - len(group))
        new = _slots([rows[slot] for slot in group], count, greedy)
        yield np.array(group + nowhere, np.int32), tokens, new


def _slots(rows: Sequence[Row], count: int, greedy: bool) -> Slots:
    """Those of the rows, and others of a single token up to `count`."""

    def column(dtype: DTypeLike, values: Iterable[float], otherwise: float) -> Any:
        return np.fromiter(chain(values, repeat(otherwise)), dtype, count)

    requests = [row.request for row in rows]
    lengths = column(np.int32, (len(r.prompt) for r in requests), 1)
    draws = Draws(
        temperature=column(np.float32, (r.temperature for r in requests), 0),
        top_k=column(np.int32, (r.top_k for r in requests), 0),
        top_p=column(np.float32, (r.top_p for r in requests), 1),
        seed=column(np.uint32, (r.seed % 2**32 for r in requests), 0),
    )
    return Slots(
        token=column(np.int32, (), 0),
        length=lengths,
        prompt=lengths,
        limit=column(np.int32, (row.limit for row in rows), 1),
        finish=column(np.int32, (), RUNNING),
        draws=None if greedy else draws,
    )

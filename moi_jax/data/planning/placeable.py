"""Which instructions a group can hold: the others are left out before anything is drawn.

A group must fit a row. A long instruction needs short partners, and there may be too few of them.
Only the long instruction is then left out, never its partners.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.config import Data
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.mixture import epoch_counts
from moi_jax.data.planning.swaps import long_with_short

log = logging.getLogger(__name__)

STEPS = 8  # in which about all instructions that are too long are left out
GROUPS = 4096  # groups that stand for all groups of an epoch
ROW_STEP = 64  # a proposed row length is a multiple of it
PLACED = 0.99  # the share of the instructions that a proposed row length places


class NoGroupFits(UserError):
    """Even the shortest instructions make a group that is longer than a row."""

    def __init__(self, limit: int):
        super().__init__(
            f"no group of instructions fits a row of {limit} tokens; raise data.sequence_length or "
            f"lower data.max_instruction_tokens"
        )


def placeable(corpus: Corpus, data: Data, sequence_length: int | None = None) -> np.ndarray:
    """bool[instructions]: False for those that no group can hold, in some stage.

    First each instruction is tried with the shortest partners. Then groups of a whole epoch are
    formed, the long instructions with the short ones. While groups are too long, each leaves out
    the instruction that is furthest above the shortest one of its domain.

    Args:
      sequence_length: of the rows; None for data.sequence_length.

    Raises:
      NoGroupFits: whatever is left out.
      UserError: there is nothing to draw from.
    """
    limit = sequence_length or data.sequence_length
    kept = np.ones(len(corpus.lengths), bool)
    for stage in range(max(1, len(data.stages))):
        for pool in _pools(corpus, data.of_stage(stage), limit):
            kept[pool.numbers[pool.kept :]] = False
    return kept


@dataclass
class _Pool:
    """The instructions that may fill a column of the groups.

    Attributes:
      numbers: int64[n] global numbers, the shortest instruction first.
      lengths: int32[n] tokens.
      weights: float64[n], how often each is drawn in an epoch.
      kept: only so many of the first are kept.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    kept: int

    @classmethod
    def of(cls, numbers: np.ndarray, corpus: Corpus, weights: np.ndarray) -> "_Pool":
        order = numbers[np.argsort(corpus.lengths[numbers], kind="stable")]
        return cls(order, corpus.lengths[order], weights[order], len(order))

    def sample(self, count: int) -> np.ndarray:
        """int32[count]: lengths at equal distances in the distribution of the kept ones."""
        ends = np.cumsum(self.weights[: self.kept])
        middles = (np.arange(count) + 0.5) / count * ends[-1]
        return self.lengths[np.searchsorted(ends, middles)]


def _pools(corpus: Corpus, data: Data, limit: int) -> list[_Pool]:
    """The pool of each column, without the instructions that are left out."""
    draws = epoch_counts(corpus, data)
    samples = np.diff(corpus.conversation_starts)
    of_conversation = np.repeat(draws / np.maximum(corpus.counts, 1), corpus.counts)
    weights = np.repeat(of_conversation / samples, samples)
    numbers = np.arange(len(weights))
    if data.sampling == "balanced":
        pools = [_Pool.of(n, corpus, weights) for n in np.split(numbers, corpus.offsets[1:-1])]
    else:
        assert data.chunk_size is not None  # resolved by the config
        pools = [_Pool.of(numbers[weights > 0], corpus, weights)] * data.chunk_size
    shortest = np.array([pool.lengths[0] for pool in pools])
    if shortest.sum() > limit:
        raise NoGroupFits(limit)
    for pool in pools:
        longest = limit - shortest.sum() + pool.lengths[0]
        pool.kept = int(np.searchsorted(pool.lengths, longest, side="right"))
    _shorten(pools, shortest, limit)
    return pools


def _shorten(pools: list[_Pool], shortest: np.ndarray, limit: int) -> None:
    """Leaves out long instructions until groups of those that are kept fit.

    Args:
      pools: of each column; they may be one and the same.
      shortest: int[W], the shortest instruction of each column.
    """
    columns = {id(pool): [p is pool for p in pools] for pool in pools}
    while True:
        samples = np.stack([pool.sample(GROUPS) for pool in pools], axis=1)
        lengths = np.take_along_axis(samples, long_with_short(samples), axis=0)
        long = lengths[lengths.sum(axis=1) > limit]
        if not len(long):
            return
        blamed = np.bincount((long - shortest).argmax(axis=1), minlength=len(pools))
        for pool in {id(pool): pool for pool in pools}.values():
            mine = columns[id(pool)]
            share = blamed[mine].sum() / (GROUPS * sum(mine))
            if share:  # a part of them only: the next groups are matched anew
                pool.kept -= min(math.ceil(share * pool.kept / STEPS), pool.kept - 1)


def check_placeable(corpus: Corpus, data: Data) -> np.ndarray:
    """`placeable`, unless more than data.max_unplaceable of the instructions are left out.

    Raises:
      UserError: more are left out; it names the row length that places nearly all.
    """
    limit, count = data.sequence_length, len(corpus.lengths)
    try:
        kept = placeable(corpus, data)
    except NoGroupFits:
        raise UserError(
            f"no group of instructions fits a row of {limit:,} tokens; set data.sequence_length to "
            f"{_row_length(corpus, data):,}, which places {PLACED:.0%} of all, or lower "
            f"data.max_instruction_tokens"
        ) from None
    lost = np.flatnonzero(~kept)
    if len(lost) <= data.max_unplaceable * count:
        return kept
    most = np.argmax(np.bincount(corpus.domain_of(lost), minlength=len(corpus.names)))
    raise UserError(
        f"{len(lost):,} of {count:,} training instructions ({len(lost) / count:.1%}, most of them "
        f"of domain {corpus.names[most]}) are too long to share a row of {limit:,} tokens with "
        f"their partners; set data.sequence_length to {_row_length(corpus, data):,}, which places "
        f"{PLACED:.0%} of all, or data.max_unplaceable to 1 to train without these"
    )


def log_left_out(corpus: Corpus, kept: np.ndarray, data: Data) -> None:
    """Logs a warning for each domain with instructions that are left out."""
    lost = np.flatnonzero(~kept)
    for domain, name in enumerate(corpus.names):
        lengths = corpus.lengths[lost[corpus.domain_of(lost) == domain]]
        if len(lengths):
            log.warning(
                f"domain {name}: {len(lengths):,} instructions of {lengths.min():,} tokens and "
                f"more are left out, because no group of {data.sequence_length:,} tokens can hold "
                f"them; raise data.sequence_length or lower data.max_instruction_tokens"
            )


def _row_length(corpus: Corpus, data: Data) -> int:
    """The shortest row, in steps of ROW_STEP, that places PLACED of the instructions."""
    too_short = data.sequence_length // ROW_STEP
    width = max(data.of_stage(n).chunk_size or 1 for n in range(max(1, len(data.stages))))
    enough = too_short + -(-int(corpus.lengths.max()) * width // ROW_STEP)
    while enough - too_short > 1:
        middle = (too_short + enough) // 2
        if _placed(corpus, data, middle * ROW_STEP) >= PLACED:
            enough = middle
        else:
            too_short = middle
    return enough * ROW_STEP


def _placed(corpus: Corpus, data: Data, sequence_length: int) -> float:
    try:
        return float(placeable(corpus, data, sequence_length).mean())
    except NoGroupFits:
        return 0.0

"""The plan of an epoch: which instructions form which group, and which groups share a row.

It is a pure function of (corpus lengths, data config, seed, stage, epoch) and, in later stages of
a curriculum, of the number of draws in the stages before.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from moi_jax.config import Data
from moi_jax.data.planning import mixture, packing, small_domains, swaps
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.mixture import RandomStream
from moi_jax.data.planning.placeable import NoGroupFits

# Goes up when the same arguments give another plan. 2 shuffles the groups of a row, deals out small
# domains, and leaves out alone what no group can hold.
PLANNER = 2


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: M places of instructions in G groups in R rows, all in row order."""

    epoch: int
    sequence_length: int
    corpus: Corpus
    instructions: np.ndarray  # int64[M] global numbers; a number may occur several times
    group_starts: np.ndarray  # int64[G + 1] into instructions
    row_starts: np.ndarray  # int64[R + 1] into groups
    moved_instructions: int  # places filled by another instruction than the one that was drawn
    unplaced: np.ndarray  # int64[U] instructions of groups that are left out: they fit no row
    unplaced_groups: int
    draws: np.ndarray  # int64[domains] number of draws of each domain

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, row: int) -> list[np.ndarray]:
        """The groups of a row, each int64[members] of global instruction numbers."""
        first, last = self.row_starts[row], self.row_starts[row + 1]
        bounds = self.group_starts[first : last + 1]
        return [self.instructions[a:b] for a, b in pairwise(bounds)]

    @cached_property
    def instruction_starts(self) -> np.ndarray:
        """int64[R + 1] into instructions: where each row begins."""
        return self.group_starts[self.row_starts]

    def segment_lengths(self, first: int, after: int, mask: str) -> np.ndarray:
        """int64[segments]: the tokens of each segment in the rows [first, after).

        Args:
          mask: what a segment is, as in `data.loader.assemble`.
        """
        begin, end = self.instruction_starts[[first, after]]
        starts = {
            "chunk": self.group_starts[self.row_starts[first] : self.row_starts[after]],
            "row": self.instruction_starts[first:after],
            "instruction": np.arange(begin, end),
        }[mask]
        lengths = self.corpus.lengths[self.instructions[begin:end]].astype(np.int64)
        return np.add.reduceat(lengths, starts - begin)

    @cached_property
    def tokens(self) -> int:
        return int(self.corpus.lengths[self.instructions].sum(dtype=np.int64))

    @cached_property
    def domain_loss_tokens(self) -> np.ndarray:
        """T_d, int64[domains]: loss tokens of each domain, counting every occurrence."""
        occurrences = np.bincount(self.instructions, minlength=len(self.corpus.lengths))
        sums = np.append(0, np.cumsum(occurrences * self.corpus.loss_lengths))
        return np.diff(sums[self.corpus.offsets])

    @property
    def loss_tokens(self) -> int:
        return int(self.domain_loss_tokens.sum())

    @property
    def fill(self) -> float:
        """Real tokens / (rows x sequence_length)."""
        return self.tokens / (self.rows * self.sequence_length)

    @cached_property
    def fingerprint(self) -> str:
        """A fingerprint of the plan, because numpy's permutations may differ between releases."""
        arrays = (self.instructions, self.group_starts, self.row_starts)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]

    def row_loss_tokens(self) -> np.ndarray:
        """int64[R]: the loss tokens of each row."""
        sums = np.append(0, np.cumsum(self.corpus.loss_lengths[self.instructions], dtype=np.int64))
        return np.diff(sums[self.instruction_starts])


def plan_epoch(
    corpus: Corpus,
    data: Data,
    seed: int,
    epoch: int,
    stage: int = 0,
    first_draws: np.ndarray | int = 0,
    *,
    groups: int | None = None,
) -> EpochPlan:
    """Plans an epoch: draws groups, repairs those longer than a row, packs them, shuffles the rows.

    Args:
      data: the section with the sampling of the stage.
      stage: of the curriculum; its number is in the key of every random stream.
      first_draws: int64[domains], draws of each domain before epoch 0 of the stage.
      groups: plan only this number of groups, the first ones of the epoch.

    Raises:
      UserError: there is nothing to plan, or no group fits a row.
    """
    lengths, limit = corpus.lengths, data.sequence_length
    same_column = data.sampling == "balanced"

    def rng(stream: RandomStream) -> np.random.Generator:
        return mixture.generator(seed, stream, epoch, stage)

    drawn = mixture.draw_groups(corpus, data, seed, epoch, stage, first_draws, groups)
    members = swaps.repair_groups(
        drawn, lengths, limit, same_column, rng(RandomStream.REPAIR), corpus.conversation_of
    )
    sizes = mixture.group_sizes(members, lengths)
    fits = (sizes > 0) & (sizes <= limit)
    unplaced = members[~fits]
    drawn, members, sizes = drawn[fits], members[fits], sizes[fits]
    if not len(members):
        raise NoGroupFits(limit)
    members, row_of = _rows(members, corpus, data, rng(RandomStream.FILL))
    moved = int(np.count_nonzero(members != drawn))
    counts = np.diff(corpus.offsets).tolist()
    members = mixture.order_members(members, counts, data, seed, epoch, stage)
    rows = int(row_of.max()) + 1
    row_of = rng(RandomStream.ROWS).permutation(rows)[row_of]
    # Length must not tell the place of a group in its row. Sequential rows keep draw order.
    if data.packing == "best_fit":
        shuffled = rng(RandomStream.GROUPS).permutation(len(members))
        members, row_of = members[shuffled], row_of[shuffled]
    members = members[np.argsort(row_of, kind="stable")]
    present = members >= 0
    return EpochPlan(
        epoch=epoch,
        sequence_length=limit,
        corpus=corpus,
        instructions=members[present],
        group_starts=np.append(0, np.cumsum(present.sum(axis=1))),
        row_starts=np.append(0, np.cumsum(np.bincount(row_of, minlength=rows))),
        moved_instructions=moved,
        unplaced=unplaced[unplaced >= 0],
        unplaced_groups=len(unplaced),
        draws=mixture.draw_counts(corpus, data, seed, epoch, stage, groups),
    )


def _rows(
    members: np.ndarray, corpus: Corpus, data: Data, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Puts groups into rows by data.packing and data.repeat_in_row.

    Returns:
      The members, some of them swapped, and int64[G], the row of each group. best_fit never needs
      more rows than sequential.
    """
    if data.repeat_in_row == "forbid":
        return _rows_without_copies(members, corpus.lengths, data, rng, corpus.conversation_of)
    # As if every place had a conversation of its own.
    numbers = members[members >= 0]
    apart = np.full(members.shape, -1)
    apart[members >= 0] = np.arange(len(numbers))
    apart, row_of = _rows_without_copies(apart, corpus.lengths[numbers], data, rng, None)
    return np.where(apart < 0, -1, numbers[apart]), row_of


def _rows_without_copies(
    members: np.ndarray,
    lengths: np.ndarray,
    data: Data,
    rng: np.random.Generator,
    conversation_of: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    assert data.packing is not None  # resolved by the config
    limit, sizes = data.sequence_length, mixture.group_sizes(members, lengths)
    held = packing.conversations(members, conversation_of)
    if data.packing != "best_fit":
        return members, packing.pack(held, sizes, limit, data.packing)
    if data.sampling == "balanced":
        filled, row_of = small_domains.place_chunks(members, lengths, limit, rng, conversation_of)
    else:
        row_of = packing.pack(held, sizes, limit, "best_fit")
        filled, row_of = swaps.fill_rows(
            members, row_of, lengths, limit, False, rng, conversation_of=conversation_of
        )
    in_order = packing.pack(held, sizes, limit, "sequential")
    if in_order.max() < row_of.max():
        return members, in_order
    return filled, row_of


def last_epoch(whole: EpochPlan, rows: int, arguments: tuple[Any, ...]) -> EpochPlan:
    """The plan of the epoch in which a stage ends: it draws only as many groups as fill `rows`.

    No group is cut off, since the next stage goes on after the last draw of this one.

    Args:
      whole: the plan of the whole epoch, which has more rows.
      arguments: the arguments of `plan_epoch`.
    """
    few, many = 0, len(whole.group_starts) - 1 + whole.unplaced_groups
    groups_a_row = many / whole.rows
    plan, guess = whole, max(1, int(rows * groups_a_row))
    while few < guess < many:
        tried = plan_epoch(*arguments, groups=guess)
        if tried.rows <= rows:
            few, plan = guess, tried
        else:
            many = guess
        missing = rows - tried.rows
        if not missing:
            break
        step = max(1, int(abs(missing) * groups_a_row))
        guess = min(max(guess + step if missing > 0 else guess - step, few + 1), many - 1)
    return _split_rows(plan, rows)


def _split_rows(plan: EpochPlan, rows: int) -> EpochPlan:
    """The plan with some of its rows split between two groups, so that it has `rows` rows."""
    inside = np.setdiff1d(np.arange(len(plan.group_starts) - 1), plan.row_starts)
    split = inside[: rows - plan.rows]
    return dataclasses.replace(plan, row_starts=np.union1d(plan.row_starts, split))

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

from moi_jax.common.errors import UserError
from moi_jax.config import Data
from moi_jax.data.planning import mixture, packing, swaps
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.mixture import RandomStream


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
    assert data.packing is not None  # resolved by the config
    counts, lengths, limit = corpus.counts, corpus.lengths, data.sequence_length
    same_column = data.sampling == "balanced"

    def rng(stream: RandomStream) -> np.random.Generator:
        return mixture.generator(seed, stream, epoch, stage)

    drawn = mixture.draw_groups(corpus, data, seed, epoch, stage, first_draws, groups)
    members = swaps.repair_groups(drawn, lengths, limit, same_column, rng(RandomStream.REPAIR))
    sizes = mixture.group_sizes(members, lengths)
    fits = (sizes > 0) & (sizes <= limit)
    unplaced = members[~fits]
    drawn, members, sizes = drawn[fits], members[fits], sizes[fits]
    if not len(members):
        raise UserError(
            f"no group of instructions fits a row of {limit} tokens; raise "
            f"data.sequence_length or lower data.max_instruction_tokens"
        )
    row_of = packing.pack(members, sizes, limit, data.packing)
    if data.packing == "best_fit":
        members, row_of = swaps.fill_rows(
            members, row_of, lengths, limit, same_column, rng(RandomStream.FILL)
        )
    moved = int(np.count_nonzero(members != drawn))
    members = mixture.order_members(members, counts, data, seed, epoch, stage)
    rows = int(row_of.max()) + 1
    row_of = rng(RandomStream.ROWS).permutation(rows)[row_of]
    # Within a row the groups keep draw order, which is random; the order of best_fit would put the
    # longest group first.
    members = members[np.argsort(row_of, kind="stable")]
    present = members >= 0
    of_domain = corpus.domain_of(np.concatenate([members[present], unplaced[unplaced >= 0]]))
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
        draws=np.bincount(of_domain, minlength=len(counts)),
    )


def cut_epoch(plan: EpochPlan, rows: int) -> EpochPlan:
    """The plan with only its first rows."""
    groups = plan.row_starts[: rows + 1]
    instructions = plan.group_starts[: groups[-1] + 1]
    return dataclasses.replace(
        plan,
        instructions=plan.instructions[: instructions[-1]],
        group_starts=instructions,
        row_starts=groups,
    )


def last_epoch(whole: EpochPlan, rows: int, arguments: tuple[Any, ...]) -> EpochPlan:
    """The plan of the epoch in which a stage ends: it draws only as many groups as fill `rows`.

    The draws of the next stage follow on it, so it is not enough to cut the plan of the whole
    epoch. Only the groups beyond the last row are cut, fewer than a row holds.

    Args:
      whole: the plan of the whole epoch, which has more rows.
      arguments: the arguments of `plan_epoch`.
    """
    groups_a_row = (len(whole.group_starts) - 1 + whole.unplaced_groups) / whole.rows
    groups, plan = 0, None
    while plan is None or plan.rows < rows:
        missing = rows - (plan.rows if plan else 0)
        groups += max(1, int(missing * groups_a_row))
        plan = plan_epoch(*arguments, groups=groups)
    return cut_epoch(plan, rows)

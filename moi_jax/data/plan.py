"""The plan of an epoch, which instruction stands in which group in which row, and of a whole run.

A plan is a pure function of (corpus lengths, data config, seed, epoch): no epoch needs the one
before it, so every row of the endless sequence of epochs can be found from its number alone.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from moi_jax.config import Data, Train
from moi_jax.data import mixture, packing
from moi_jax.data.domain_cache import DomainCache, loss_column
from moi_jax.data.selection import Selection
from moi_jax.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Lengths of all training instructions, which is all that planning knows of them.

    Instructions are numbered globally and domain-major: instruction i of domain d is
    offsets[d] + i.
    """

    names: tuple[str, ...]  # domains in config order
    offsets: np.ndarray  # int64[K + 1]
    lengths: np.ndarray  # int32[N] tokens
    loss_lengths: np.ndarray  # int32[N] tokens that carry loss

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        lengths: Sequence[np.ndarray],
        loss_lengths: Sequence[np.ndarray],
    ) -> "Corpus":
        """From int32[n_d] arrays of each domain."""
        counts = [len(domain) for domain in lengths]
        return cls(
            tuple(names),
            np.cumsum([0, *counts]),
            np.concatenate(lengths).astype(np.int32),
            np.concatenate(loss_lengths).astype(np.int32),
        )

    @classmethod
    def of_training(
        cls, caches: Sequence[DomainCache], selections: Sequence[Selection], targets: str
    ) -> "Corpus":
        """Of the instructions selected for training, with the labels of loss.targets."""
        column = loss_column(targets)
        lengths = [c.lengths[s.train] for c, s in zip(caches, selections, strict=True)]
        return cls.of(
            [cache.name for cache in caches],
            [domain[:, 0] for domain in lengths],
            [domain[:, column] for domain in lengths],
        )

    @property
    def counts(self) -> list[int]:
        """Training instructions of each domain."""
        return np.diff(self.offsets).tolist()

    def domain_of(self, instructions: np.ndarray) -> np.ndarray:
        """int64[...] domain ids, the position of the domain in config order."""
        return np.searchsorted(self.offsets, instructions, side="right") - 1


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: M instruction places in G groups in R rows, all in row order."""

    epoch: int
    sequence_length: int
    corpus: Corpus
    instructions: np.ndarray  # int64[M] global numbers; one number may occur several times
    group_starts: np.ndarray  # int64[G + 1] into instructions
    row_starts: np.ndarray  # int64[R + 1] into groups
    moved: int  # instructions that stand in another group than they were drawn for
    unplaced_groups: int  # groups left out because no repair made them fit a row
    unplaced_instructions: int

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
        """T_d, int64[K]: tokens of each domain that carry loss, every occurrence counted."""
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
        """Of the whole plan: numpy does not promise equal permutations in all its releases."""
        arrays = (self.instructions, self.group_starts, self.row_starts)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]

    def row_loss_tokens(self) -> np.ndarray:
        """int64[R]: tokens of each row that carry loss."""
        sums = np.append(0, np.cumsum(self.corpus.loss_lengths[self.instructions], dtype=np.int64))
        return np.diff(sums[self.instruction_starts])


def plan_epoch(corpus: Corpus, data: Data, seed: int, epoch: int) -> EpochPlan:
    """Plans an epoch: draw groups, mend those longer than a row, pack them, shuffle the rows.

    Raises:
      UserError: there is nothing to plan, or no group fits a row.
    """
    assert data.packing is not None  # resolved by the config
    counts, lengths = corpus.counts, corpus.lengths
    repaired = mixture.repair(
        mixture.draw_groups(counts, data, seed, epoch),
        lengths,
        data.sequence_length,
        same_column=data.sampling == "balanced",
        rng=mixture.generator(seed, mixture.Stream.REPAIR, epoch),
    )
    members = mixture.order_members(repaired.members, counts, data, seed, epoch)
    if not len(members):
        raise UserError(
            f"no group of instructions fits a row of {data.sequence_length} tokens; raise "
            f"data.sequence_length or lower data.max_instruction_tokens"
        )
    sizes = mixture.group_sizes(members, lengths)
    row_of = packing.pack(members, sizes, data.sequence_length, data.packing)
    rows = int(row_of.max()) + 1
    row_of = mixture.generator(seed, mixture.Stream.ROWS, epoch).permutation(rows)[row_of]
    # In a row the groups keep draw order, which is random: best_fit's own order would put the
    # longest first.
    members = members[np.argsort(row_of, kind="stable")]
    present = members >= 0
    return EpochPlan(
        epoch=epoch,
        sequence_length=data.sequence_length,
        corpus=corpus,
        instructions=members[present],
        group_starts=np.append(0, np.cumsum(present.sum(axis=1))),
        row_starts=np.append(0, np.cumsum(np.bincount(row_of, minlength=rows))),
        moved=repaired.moved,
        unplaced_groups=repaired.unplaced_groups,
        unplaced_instructions=repaired.unplaced_instructions,
    )


# Full plans held: the epoch being read, the next one, and the last one, for which threads that
# read ahead may still ask; of small epochs as many more as these instructions make up.
PLANS_KEPT = 3
INSTRUCTIONS_KEPT = 1 << 20


class RunPlan:
    """The endless sequence of rows, epoch after epoch, and how many of them a run takes.

    Full plans are kept for few epochs; of the others only the first row is known. The next epoch
    is planned in the background as soon as a row of the one before it is asked for. Safe to call
    from several threads.

    Attributes:
      batch_rows: rows of a global batch.
      total_rows: rows of the run; the rest of its last batch is empty.
      total_steps: global batches of the run.
      empty_rows: rows without tokens at the end of the run's last batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: Data,
        train: Train,
        first_rows: Sequence[int] = (0,),
        step: int = 0,
        row: int = 0,
    ):
        """Plans as many epochs as the length of the run needs to be known in rows.

        Args:
          first_rows: first global row of each epoch as an earlier run of the same plan knew them
            (see `first_rows`); their epochs are not planned again to count rows.
          step, row: batches already seen and the first row of the next, where a run goes on.
        """
        self.corpus, self.data, self.seed = corpus, data, train.seed
        self._first_rows = list(first_rows)
        self._plans: OrderedDict[int, Future[EpochPlan]] = OrderedDict()
        self._lock = threading.RLock()
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="epoch-plan")
        self.batch_rows = train.global_batch_rows
        # Instructions of an epoch at most, whatever the sampling.
        self._epoch_size = len(corpus.counts) * max(corpus.counts)
        if train.steps:
            self.total_rows = row + (train.steps - step) * self.batch_rows
        elif train.loss_tokens:
            self.total_rows = self._rows_with_loss_tokens(train.loss_tokens)
        else:
            assert train.epochs is not None  # the config has exactly one of the three
            self.total_rows = self.rows_before(train.epochs)
        # The batches seen may have had another size than those to come.
        self.total_steps = step + -(-(self.total_rows - row) // self.batch_rows)
        self.empty_rows = row + (self.total_steps - step) * self.batch_rows - self.total_rows

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """The full plan of an epoch, planned now if it is not at hand."""
        return self._request(epoch).result()

    def rows_before(self, epoch: int) -> int:
        """First global row of an epoch."""
        with self._lock:
            while len(self._first_rows) <= epoch:
                rows = self.epoch_plan(len(self._first_rows) - 1).rows
                self._first_rows.append(self._first_rows[-1] + rows)
            return self._first_rows[epoch]

    def locate(self, global_row: int) -> tuple[int, int]:
        """(epoch, row of the epoch) of a row of the endless sequence."""
        with self._lock:
            while self._first_rows[-1] <= global_row:
                self.rows_before(len(self._first_rows))
            epoch = int(np.searchsorted(self._first_rows, global_row, side="right")) - 1
            if self._first_rows[epoch + 1] < self.total_rows:
                self._request(epoch + 1)
            return epoch, global_row - self._first_rows[epoch]

    def first_rows(self, global_row: int) -> list[int]:
        """First global row of every epoch that row lies in or after: what a checkpoint keeps."""
        epoch, _ = self.locate(global_row)
        return self._first_rows[: epoch + 1]

    def _request(self, epoch: int) -> Future[EpochPlan]:
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._planner.submit(
                    plan_epoch, self.corpus, self.data, self.seed, epoch
                )
            self._plans.move_to_end(epoch)
            while len(self._plans) > max(PLANS_KEPT, INSTRUCTIONS_KEPT // self._epoch_size):
                self._plans.popitem(last=False)
            return self._plans[epoch]

    def _rows_with_loss_tokens(self, loss_tokens: int) -> int:
        """Rows until at least so many tokens carried loss."""
        epoch, missing = 0, loss_tokens
        while True:
            sums = np.cumsum(self.epoch_plan(epoch).row_loss_tokens())
            if not sums[-1]:
                raise UserError("no token carries loss, so train.loss_tokens is never reached")
            if sums[-1] >= missing:
                return self.rows_before(epoch) + int(np.searchsorted(sums, missing)) + 1
            missing -= int(sums[-1])
            epoch += 1

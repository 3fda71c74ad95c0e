"""The plan of a training run: an endless sequence of rows, epoch by epoch and stage by stage."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.config import Data, Train
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import EpochPlan, last_epoch, plan_epoch
from moi_jax.data.planning.mixture import epoch_counts

# Full plans kept in memory: the epoch that is read, the next one, and the one before, which slower
# threads may still read; more if epochs are small, up to this number of instructions.
PLANS_KEPT = 3
INSTRUCTIONS_KEPT = 1 << 20


class TrainingPlan:
    """The endless sequence of rows, epoch by epoch, and how many of them a run uses.

        plan = TrainingPlan(corpus, config.data, config.train)
        epoch, row = plan.locate(1_000)  # global row 1,000 is row 312 of epoch 2
        groups = plan.epoch_plan(epoch).row(row)

    Full plans are kept for few epochs; of the others only the first row is known. The next epoch
    is planned in the background as soon as a row of the epoch before it is wanted. Safe to call
    from several threads.

    Attributes:
      batch_rows: rows of a global batch.
      total_rows: rows of the run.
      total_steps: global batches of the run.
      empty_rows: rows without tokens that fill up the run's last batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: Data,
        train: Train,
        epoch_first_rows: Sequence[int] = (0,),
        step: int = 0,
        row: int = 0,
    ):
        """Plans as many epochs as needed to know the length of the run in rows.

        Args:
          epoch_first_rows: first global row of each epoch that an earlier run of the same plan
            has counted (see the method `epoch_first_rows`); these epochs are not planned again.
          step, row: for a resumed run, the number of batches done and the first row of the next.
        """
        self.corpus, self.data, self.seed = corpus, data, train.seed
        self._stages = [data.of_stage(stage) for stage in range(max(1, len(data.stages)))]
        self._begins = [stage.begins for stage in data.stages] or [0]
        self._epoch_first_rows = list(epoch_first_rows)
        self._plans: OrderedDict[int, Future[EpochPlan]] = OrderedDict()
        self._lock = threading.RLock()
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="epoch-plan")
        self.batch_rows = train.global_batch_rows
        self._epoch_size = max(int(epoch_counts(corpus, stage).sum()) for stage in self._stages)
        if train.steps:
            self.total_rows = row + (train.steps - step) * self.batch_rows
        elif train.loss_tokens:
            self.total_rows = self._rows_with_loss_tokens(train.loss_tokens)
        else:
            assert train.epochs is not None  # the config has exactly one of the three
            self.total_rows = self.rows_before(train.epochs)
        # The batches before `step` may have had another size.
        self.total_steps = step + -(-(self.total_rows - row) // self.batch_rows)
        self.empty_rows = row + (self.total_steps - step) * self.batch_rows - self.total_rows

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """The full plan of an epoch; it is planned now if it is not in memory."""
        self.rows_before(epoch)
        return self._request(epoch).result()

    def rows_before(self, epoch: int) -> int:
        """First global row of an epoch."""
        with self._lock:
            while len(self._epoch_first_rows) <= epoch:
                rows = self._request(len(self._epoch_first_rows) - 1).result().rows
                self._epoch_first_rows.append(self._epoch_first_rows[-1] + rows)
            return self._epoch_first_rows[epoch]

    def locate(self, global_row: int) -> tuple[int, int]:
        """(epoch, row of the epoch) of a global row."""
        with self._lock:
            while self._epoch_first_rows[-1] <= global_row:
                self.rows_before(len(self._epoch_first_rows))
            epoch = int(np.searchsorted(self._epoch_first_rows, global_row, side="right")) - 1
            if self._epoch_first_rows[epoch + 1] < self.total_rows:
                self._request(epoch + 1)
            return epoch, global_row - self._epoch_first_rows[epoch]

    def segment_lengths(self, first_row: int, next_row: int) -> np.ndarray:
        """int64[segments]: the tokens of each segment in the global rows [first_row, next_row)."""
        assert self.data.mask is not None  # resolved by the config
        found = [np.zeros(0, np.int64)]
        while first_row < next_row:
            epoch, row = self.locate(first_row)
            plan = self.epoch_plan(epoch)
            after = min(plan.rows, row + next_row - first_row)
            found.append(plan.segment_lengths(row, after, self.data.mask))
            first_row += after - row
        return np.concatenate(found)

    def epoch_first_rows(self, global_row: int) -> list[int]:
        """The first global row of each epoch up to the one of this row; a checkpoint keeps them."""
        epoch, _ = self.locate(global_row)
        return self._epoch_first_rows[: epoch + 1]

    def _request(self, epoch: int) -> Future[EpochPlan]:
        """The plan of an epoch whose first row is known; it may still be in the making."""
        with self._lock:
            if epoch not in self._plans:
                first_row = self._epoch_first_rows[epoch]
                stage = self._stage(first_row)
                of_stage = epoch - self._epoch_first_rows.index(self._begins[stage])
                self._plans[epoch] = self._planner.submit(
                    self._make, stage, of_stage, self._draws_before(stage), first_row
                )
            self._plans.move_to_end(epoch)
            while len(self._plans) > max(PLANS_KEPT, INSTRUCTIONS_KEPT // self._epoch_size):
                self._plans.popitem(last=False)
            return self._plans[epoch]

    def _stage(self, row: int) -> int:
        return int(np.searchsorted(self._begins, row, side="right")) - 1

    def _draws_before(self, stage: int) -> np.ndarray:
        """int64[domains]: the draws of each domain in all earlier stages."""
        draws = np.zeros(len(self.corpus.counts), np.int64)
        for earlier in range(stage):
            first, after = (self._epoch_first_rows.index(self._begins[earlier + n]) for n in (0, 1))
            whole = epoch_counts(self.corpus, self._stages[earlier])
            draws += (after - 1 - first) * whole + self.epoch_plan(after - 1).draws
        return draws

    def _make(self, stage: int, epoch: int, first_draws: np.ndarray, first_row: int) -> EpochPlan:
        """The plan of a stage's epoch; it is shorter if the stage ends in it."""
        arguments = (self.corpus, self._stages[stage], self.seed, epoch, stage, first_draws)
        plan = plan_epoch(*arguments)
        if stage + 1 < len(self._begins) and self._begins[stage + 1] < first_row + plan.rows:
            return last_epoch(plan, self._begins[stage + 1] - first_row, arguments)
        return plan

    def _rows_with_loss_tokens(self, loss_tokens: int) -> int:
        """The number of rows that hold at least this many loss tokens."""
        epoch, missing = 0, loss_tokens
        while True:
            sums = np.cumsum(self.epoch_plan(epoch).row_loss_tokens())
            if not sums[-1]:
                raise UserError("no token carries loss, so train.loss_tokens is never reached")
            if sums[-1] >= missing:
                return self.rows_before(epoch) + int(np.searchsorted(sums, missing)) + 1
            missing -= int(sums[-1])
            epoch += 1

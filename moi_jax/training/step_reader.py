"""Reads the metrics of dispatched steps: logs them, and stops a run that only skips."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from moi_jax.common.errors import UserError
from moi_jax.training.device_figures import Work
from moi_jax.training.metrics import StepWindow, log_step
from moi_jax.training.run import Run, is_due
from moi_jax.training.step import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Dispatched:
    """A step whose metrics may still be on their way: rows [first_row, next_row)."""

    step: int
    first_row: int
    next_row: int
    metrics: Metrics


class StepReader:
    """Reads the metrics of each step after the next step was dispatched."""

    def __init__(self, run: Run):
        self._run = run
        self._held: _Dispatched | None = None
        self._read: tuple[_Dispatched, dict[str, Any]] | None = None  # the step read last
        self._window = StepWindow(run.domains, run.config.data.sequence_length)
        self._window_step = run.step
        self._pairs = 0
        self._spent = dict(run.clock.seconds)

    def hold(self, step: int, first_row: int, next_row: int, metrics: Metrics) -> None:
        """Holds the metrics of a dispatched step until `read_previous`."""
        self._held = _Dispatched(step, first_row, next_row, metrics)

    @contextmanager
    def paused(self, part: str) -> Iterator[None]:
        """Counts the time of the work inside for a part of the clock, and not as throughput."""
        started = time.monotonic()
        with self._run.clock.part(part):
            yield
        self._window.pause(time.monotonic() - started)

    def read_previous(self) -> None:
        """Waits for the held step, logs if a log line is due, and stops a run that only skips.

        Raises:
          UserError: too many steps in a row are not finite or have a spike; or a spike must stop
            the run.
        """
        if self._held is None:
            return
        held, self._held = self._held, None
        metrics = jax.device_get(held.metrics)
        self._read = held, metrics
        run = self._run
        if metrics["applied"]:
            run.skipped_in_a_row = 0
            run.loss_limit.add(held.step, float(metrics["loss"]))
            self._window.add(metrics, held.next_row - held.first_row)
            self._pairs += run.pairs_of(held.first_row, held.next_row)
        else:
            self._report_skip(held, metrics)
        if held.step == run.steps or is_due(held.step, run.config.logging.every):
            self.write_window()

    def _report_skip(self, held: _Dispatched, metrics: dict[str, Any]) -> None:
        """Logs a step whose update was skipped, with its rows; stops a run that must not go on."""
        run = self._run
        empty = metrics["weights"] == 0
        spike = metrics["loss"] > run.loss_limit.before(held.step)
        record = {
            "step": held.step,
            "row": held.next_row,
            "skipped": True,
            "reason": "no loss tokens" if empty else "loss spike" if spike else "not finite",
            "first_row": held.first_row,
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
        }
        run.log.write(record)
        rows = f"rows {held.first_row} to {held.next_row - 1}"
        if empty:
            log.info("step %d: %s have no loss tokens; update skipped", held.step, rows)
            return
        run.skipped_in_a_row += 1
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        if spike:
            before = run.loss_limit.median(held.step)
            what = f"loss {metrics['loss']:.4g} after a median of {before:.4g}"
        log.warning("step %d: %s over %s; update skipped", held.step, what, rows)
        self._check_skips(held.step, rows, what if spike else None)

    def _check_skips(self, step: int, rows: str, spike: str | None) -> None:
        """Raises UserError if the run must not go on after a skipped step."""
        run, limits = self._run, self._run.config.train
        unaffected = f"The last checkpoint in {run.directory} is not affected"
        if spike and limits.on_spike == "stop":
            raise UserError(
                f"step {step} over {rows} has a loss spike ({spike}); check those rows, or set "
                f"train.on_spike=skip to leave them out. {unaffected}"
            )
        if run.skipped_in_a_row >= limits.max_skipped_in_a_row:
            causes = "not finite or had a loss spike" if limits.max_loss_ratio else "not finite"
            raise UserError(
                f"{run.skipped_in_a_row} steps in a row were {causes}, the last over {rows} "
                f"(step {step}); lower optimizer.learning_rate or check those rows. {unaffected}"
            )

    def write_window(self) -> None:
        """Logs the steps since the last logged step: when due, and before every checkpoint.

        A run that is resumed from a checkpoint knows nothing of the steps before it.
        """
        if self._read is None or self._window.empty:
            return
        run, window, (held, metrics) = self._run, self._window, self._read
        seconds = window.seconds
        record = {
            "step": held.step,
            "epoch": run.epoch_of(held.first_row),
            "row": held.next_row,
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            **window.record(),
            **run.devices.record(
                Work(window.rows, window.tokens, self._pairs, window.loss_tokens, seconds)
            ),
        }
        run.log.write(record)
        spent = dict(run.clock.seconds)
        waited, compiled = (spent[part] - self._spent[part] for part in ("data_wait", "compile"))
        log_step(record, run.steps, seconds / (held.step - self._window_step), waited, compiled)
        window.restart()
        self._window_step, self._pairs, self._spent = held.step, 0, spent

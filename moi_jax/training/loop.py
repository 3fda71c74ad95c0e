"""The training loop, read top to bottom."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax

from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.data.loader import Batch
from moi_jax.models.decoder import Tree
from moi_jax.training.early_stopping import EarlyStopping
from moi_jax.training.metrics import MetricsLog, StepWindow, log_step
from moi_jax.training.profiling import StepProfiler
from moi_jax.training.state import TrainState
from moi_jax.training.step import Metrics

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3

ShouldStop = Callable[[], bool]
# (parameters, should_stop) -> metrics by name; none when it was given up because the run stops.
Evaluate = Callable[[Tree, ShouldStop], dict[str, float]]


class Evaluations(Protocol):
    """What is asked of the parameters while a run trains. None leaves a part out.

    Attributes:
      held_out: losses, every eval.every steps.
      benchmarks: scores, every eval.benchmarks.every steps.
      samples: answers, every train.sample_every steps, as samples.jsonl holds them.
    """

    @property
    def held_out(self) -> Evaluate | None: ...
    @property
    def benchmarks(self) -> Evaluate | None: ...
    @property
    def samples(self) -> Callable[[Tree], list[dict[str, str]]] | None: ...


class NoEvaluations:
    """Trains alone."""

    held_out = benchmarks = samples = None


@dataclasses.dataclass
class Run:
    """A run ready to go on from (state, step, row): the loop needs nothing else.

    `step` batches have been seen, and the next one is rows [row, row + batch).
    """

    config: Config
    directory: Path
    domains: tuple[str, ...]
    steps: int
    total_rows: int
    state: TrainState
    step: int
    row: int
    skipped_in_a_row: int
    batches: Iterator[Batch]  # on the mesh, from `row` on
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    position: Callable[[int], dict[str, Any]]  # row -> what a checkpoint keeps of the data
    epoch_of: Callable[[int], int]  # row -> epoch
    evaluations: Evaluations
    early_stopping: EarlyStopping
    profiler: StepProfiler
    checkpoints: RunCheckpoints
    log: MetricsLog

    @property
    def finished(self) -> bool:
        """Whether the run is at its end: its last step, or an earlier one by early stopping."""
        return self.step == self.steps or self.early_stopping.ended


def fit(run: Run, should_stop: ShouldStop) -> None:
    """Trains to the end of the run, or to the step after which `should_stop` is true.

    `run` is changed in place; `run.finished` tells whether it came to its end.

    The order of the body matters. The next step is dispatched before the metrics of the last
    one are read, so the device never waits for the host; and whatever keeps the parameters (an
    evaluation, a checkpoint) comes after the flag of the step that made them has been read.
    """
    config, reader = run.config, StepReader(run)
    with contextlib.closing(run.log), contextlib.closing(run.profiler):
        with reader.paused():
            _evaluate_first(run, should_stop)
        while not run.finished and not run.early_stopping.missed_evaluation:
            if run.profiler.starts_before(run.step + 1):
                reader.read_previous()
                run.profiler.start(run.step + 1)
            first_row = run.row
            with run.profiler.annotation(run.step + 1):
                run.state, metrics = run.train_step(run.state, next(run.batches))
            run.step += 1
            run.row = min(first_row + config.train.global_batch_rows, run.total_rows)
            reader.read_previous()
            reader.hold(run.step, first_row, run.row, metrics)
            if run.profiler.ends_after(run.step):
                reader.read_previous()
                with reader.paused():
                    run.profiler.close()

            last = run.step == run.steps
            due = {
                "held_out": last or _due(run.step, config.eval.every),
                "benchmarks": last or _due(run.step, config.eval.benchmarks.every),
                "samples": last or _due(run.step, config.train.sample_every),
            }
            losses: dict[str, float] = {}
            if any(due.values()):
                reader.read_previous()
                with reader.paused():
                    losses = _evaluate(run, should_stop, **due)
            stopping = should_stop()  # asked once: a run that ends here has saved
            if run.finished or stopping or _due(run.step, config.checkpoint.every):
                reader.read_previous()
                reader.write_window()
                with reader.paused():
                    _save(run, losses)
            if stopping:
                break


def _evaluate_first(run: Run, should_stop: ShouldStop) -> None:
    """Measures what is due before the first step of this process.

    A run that stops early makes up here for an evaluation that was given up. If this one is
    given up too, the run saves and takes no step: the step would change what is counted.
    """
    start = run.step == 0
    if start or run.early_stopping.missed_evaluation:
        _evaluate(run, should_stop, held_out=True, benchmarks=start, samples=start)
    if run.early_stopping.missed_evaluation and run.checkpoints.latest() != run.step:
        _save(run, {})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(
    run: Run, should_stop: ShouldStop, *, held_out: bool, benchmarks: bool, samples: bool
) -> dict[str, float]:
    """Measures what is due with the parameters of now, and returns the held-out losses.

    When these losses end the run by early stopping, the rest is due too. When the run is asked
    to stop, no evaluation begins and the one under way is given up: the checkpoint must not wait.
    """
    parameters, asked = run.state.parameters, run.evaluations
    losses: dict[str, float] = {}
    if held_out and asked.held_out:
        losses = asked.held_out(parameters, should_stop)
        run.early_stopping.count(losses)
    if losses:
        run.log.write({"step": run.step, **losses})
        shown = "  ".join(
            f"{name} {losses[f'eval/{name}/loss']:.3f} "
            f"({losses[f'eval/{name}/default_prompt/loss']:.3f})"
            for name in (*run.domains, "mean")
        )
        log.info("step %d/%d  held-out (default prompt)  %s", run.step, run.steps, shown)
    ended = run.early_stopping.ended
    if ended:
        log.info("step %d/%d  the run stops early: %s", run.step, run.steps, run.early_stopping)
    if (benchmarks or ended) and asked.benchmarks:
        scores = asked.benchmarks(parameters, should_stop)
        if scores:
            run.log.write({"step": run.step, **scores})
            shown = "  ".join(f"{name} {score:.1f}" for name, score in scores.items())
            log.info("step %d/%d  %s", run.step, run.steps, shown)
    if (samples or ended) and asked.samples and not should_stop():
        answers = [{"step": run.step, **answer} for answer in asked.samples(parameters)]
        with (run.directory / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
    return losses


def _save(run: Run, losses: dict[str, float]) -> None:
    position = {
        "step": run.step,
        "skipped_in_a_row": run.skipped_in_a_row,
        "early_stopping": run.early_stopping.to_json(),
        **run.position(run.row),
    }
    config = run.config.model_dump(mode="json")
    run.checkpoints.save(run.step, *run.state.items(), position, config, losses)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    step: int
    first_row: int
    next_row: int
    metrics: Metrics


class StepReader:
    """Reads the metrics of each step once the one after it was dispatched."""

    def __init__(self, run: Run):
        self._run = run
        self._held: _Dispatched | None = None
        self._read: tuple[_Dispatched, dict[str, Any]] | None = None  # the step read last
        self._window = StepWindow(run.domains, run.config.data.sequence_length)
        self._window_step = run.step

    def hold(self, step: int, first_row: int, next_row: int, metrics: Metrics) -> None:
        self._held = _Dispatched(step, first_row, next_row, metrics)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work whose time is none of the throughput."""
        started = time.monotonic()
        yield
        self._window.pause(time.monotonic() - started)

    def read_previous(self) -> None:
        """Waits for the held step, logs when due, and stops a run that only skips.

        Raises:
          UserError: the third step in a row whose loss or gradient was not finite.
        """
        if self._held is None:
            return
        held, self._held = self._held, None
        metrics = jax.device_get(held.metrics)
        self._read = held, metrics
        run = self._run
        if metrics["applied"]:
            run.skipped_in_a_row = 0
            self._window.add(metrics, held.next_row - held.first_row)
        else:
            self._report_skip(held, metrics)
        if held.step == run.steps or _due(held.step, run.config.logging.every):
            self.write_window()

    def _report_skip(self, held: _Dispatched, metrics: dict[str, Any]) -> None:
        run = self._run
        rows = f"rows {held.first_row} to {held.next_row - 1}"
        empty = metrics["weights"] == 0
        record = {
            "step": held.step,
            "row": held.next_row,
            "skipped": True,
            "reason": "no loss tokens" if empty else "not finite",
            "first_row": held.first_row,
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
        }
        run.log.write(record)
        if empty:
            log.info("step %d: %s have no loss tokens, step skipped", held.step, rows)
            return
        run.skipped_in_a_row += 1
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        log.info("step %d: %s over %s; update skipped", held.step, what, rows)
        if run.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, the last over {rows} "
                f"(step {held.step}); lower optimizer.learning_rate or look at those rows. The "
                f"last checkpoint in {run.directory} is sound"
            )

    def write_window(self) -> None:
        """Logs the steps since the last logged one: when due, and with every checkpoint.

        A run that goes on from a checkpoint knows nothing of the steps before it.
        """
        if self._read is None or self._window.empty:
            return
        run, (held, metrics) = self._run, self._read
        seconds = self._window.seconds / (held.step - self._window_step)
        record = {
            "step": held.step,
            "epoch": run.epoch_of(held.first_row),
            "row": held.next_row,
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            **self._window.record(),
        }
        run.log.write(record)
        log_step(record, run.steps, seconds)
        self._window.restart()
        self._window_step = held.step

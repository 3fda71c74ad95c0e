"""The training loop, read top to bottom."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from moi_jax.checkpoints.checkpoints import RunCheckpoints
from moi_jax.common.console import say
from moi_jax.common.errors import UserError
from moi_jax.config.schema import Config
from moi_jax.data.loader import Batch
from moi_jax.models.parameters import Tree
from moi_jax.training.metrics import MetricsLog, StepWindow, print_step
from moi_jax.training.run_directory import StopSignal
from moi_jax.training.state import TrainState
from moi_jax.training.step import Metrics

MAX_SKIPPED_IN_A_ROW = 3

# (parameters, whether to give up) -> held-out losses or scores, none when given up.
Evaluate = Callable[[Tree, Callable[[], bool]], dict[str, float]]


@dataclasses.dataclass
class Run:
    """A run ready to go on from (state, step, row): the loop needs nothing else.

    `step` batches have been seen, and the next one is rows [row, row + batch). The evaluation,
    the benchmarks and the sampler are handed in by the command; None leaves them out.
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
    evaluate: Evaluate | None
    benchmark: Evaluate | None
    sample: Callable[[Tree], list[dict[str, str]]] | None
    checkpoints: RunCheckpoints
    log: MetricsLog
    stop: StopSignal
    console: Console

    def stopping(self) -> bool:
        """Whether a signal asked the run to stop."""
        return self.stop.received is not None


def fit(run: Run) -> bool:
    """Trains to the end of the run, or to the step a signal arrives in.

    Returns True when the run is finished. `run` is changed in place.

    The order of the body matters. The next step is dispatched before the metrics of the last
    one are read, so the device never waits for the host; and whatever keeps the parameters (an
    evaluation, a checkpoint) comes after the flag of the step that made them has been read.
    """
    try:
        _fit(run)
    finally:
        run.log.close()
    return run.step == run.steps


def _fit(run: Run) -> None:
    reader = StepReader(run)
    if run.step == 0:
        with reader.paused():
            _look(run, evaluate=True, benchmark=True, sample=True)
    while run.step < run.steps:
        batch = next(run.batches)
        first_row = run.row
        run.state, metrics = run.train_step(run.state, batch)
        run.step += 1
        run.row = min(first_row + run.config.train.global_batch_rows, run.total_rows)
        reader.read_previous()
        reader.hold(run.step, first_row, run.row, metrics)

        last = run.step == run.steps
        look_due = last or _due(run.step, run.config.eval.every)
        benchmark_due = last or _due(run.step, run.config.eval.generate.every)
        sample_due = last or _due(run.step, run.config.train.sample_every)
        evaluation: dict[str, float] = {}
        if look_due or benchmark_due or sample_due:
            reader.read_previous()
            with reader.paused():
                evaluation = _look(
                    run, evaluate=look_due, benchmark=benchmark_due, sample=sample_due
                )
        stopping = run.stopping()  # asked once: who leaves has saved
        if last or stopping or _due(run.step, run.config.checkpoint.every):
            reader.read_previous()
            reader.write_window()
            with reader.paused():
                _save(run, evaluation)
        if stopping:
            break


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _look(run: Run, *, evaluate: bool, benchmark: bool, sample: bool) -> dict[str, float]:
    """Held-out losses, scores and sample answers of the parameters as they stand.

    Who asks a run to stop waits for its checkpoint, not for a look at it: none begins then, and
    an evaluation under way is given up.
    """
    losses: dict[str, float] = {}
    if evaluate and run.evaluate:
        losses = run.evaluate(run.state.parameters, run.stopping)
    if losses:
        run.log.write({"step": run.step, **losses})
        shown = "  ".join(
            f"{name} {losses[f'eval/{name}/loss']:.3f} "
            f"({losses[f'eval/{name}/default_prompt/loss']:.3f})"
            for name in (*run.domains, "mean")
        )
        say(run.console, f"step {run.step}/{run.steps}  held-out (default prompt)  {shown}")
    if benchmark and run.benchmark:
        scores = run.benchmark(run.state.parameters, run.stopping)
        if scores:
            run.log.write({"step": run.step, **scores})
            shown = "  ".join(f"{name} {score:.1f}" for name, score in scores.items())
            say(run.console, f"step {run.step}/{run.steps}  {shown}")
    if sample and run.sample and not run.stopping():
        answers = [{"step": run.step, **answer} for answer in run.sample(run.state.parameters)]
        with (run.directory / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
    return losses


def _save(run: Run, evaluation: dict[str, float]) -> None:
    position = {
        "step": run.step,
        "skipped_in_a_row": run.skipped_in_a_row,
        **run.position(run.row),
    }
    config = run.config.model_dump(mode="json")
    run.checkpoints.save(run.step, run.state, position, config, evaluation)


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
            say(run.console, f"step {held.step}: {rows} have no loss tokens, step skipped")
            return
        run.skipped_in_a_row += 1
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        say(run.console, f"step {held.step}: {what} over {rows}; update skipped")
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
        print_step(run.console, record, run.steps, seconds)
        self._window.restart()
        self._window_step = held.step

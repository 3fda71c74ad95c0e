"""A run that is ready to train: its state, its data, and all that the loop calls."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moi_jax.checkpoints.local_saves import LocalSaves
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.config import Config
from moi_jax.data.loader import Batch
from moi_jax.models.decoder import Tree
from moi_jax.training.device_figures import DeviceFigures
from moi_jax.training.early_stopping import EarlyStopping
from moi_jax.training.goodput import Clock
from moi_jax.training.metrics import MetricsLog
from moi_jax.training.profiling import StepProfiler
from moi_jax.training.spikes import LossLimit
from moi_jax.training.state import TrainState
from moi_jax.training.step import TrainStep

ShouldStop = Callable[[], bool]
# (parameters, should_stop) -> metrics by name; {} if the run stops and the evaluation is abandoned.
Evaluate = Callable[[Tree, ShouldStop], dict[str, float]]


class Evaluations(Protocol):
    """The evaluations of the parameters while a run trains. None leaves one out.

    Attributes:
      held_out: returns losses, every eval.every steps.
      benchmarks: returns scores, every eval.benchmarks.every steps.
      samples: returns answers in the format of samples.jsonl, every train.sample_every steps.
    """

    @property
    def held_out(self) -> Evaluate | None: ...
    @property
    def benchmarks(self) -> Evaluate | None: ...
    @property
    def samples(self) -> Callable[[Tree], list[dict[str, str]]] | None: ...


class NoEvaluations:
    """Evaluates nothing."""

    held_out = benchmarks = samples = None


@dataclass
class Run:
    """A run that continues from (state, step, row); the loop needs nothing else.

    `step` batches have been seen. The next batch is rows [row, row + batch).
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
    loss_limit: LossLimit
    batches: Iterator[Batch]  # on the mesh, from `row` on
    train_step: TrainStep
    position: Callable[[int], dict[str, Any]]  # row -> the data position for a checkpoint
    epoch_of: Callable[[int], int]  # row -> epoch
    pairs_of: Callable[[int, int], int]  # rows [first, next) -> (query, key) pairs of attention
    devices: DeviceFigures
    evaluations: Evaluations
    early_stopping: EarlyStopping
    profiler: StepProfiler
    checkpoints: RunCheckpoints
    log: MetricsLog
    clock: Clock
    unchanged_since: int | None  # the step; None if an older version has not recorded it
    missed: set[str] = field(default_factory=set)  # evaluations abandoned at this step
    local: LocalSaves | None = None  # if the config asks for them

    @property
    def at_end(self) -> bool:
        """Whether the run takes no more step: at its last step, or earlier by early stopping."""
        return self.step == self.steps or self.early_stopping.ended

    @property
    def finished(self) -> bool:
        """Whether the run is complete: at its end, with all evaluations made."""
        return self.at_end and not self.missed


def is_due(step: int, every: int) -> bool:
    """Returns whether something with the interval `every` is due after `step`; 0 is never due."""
    return every > 0 and step % every == 0

"""A stretch of a run between two checkpoints, and its replay."""

from dataclasses import dataclass
from typing import Any

import jax

from moi_jax.checkpoints.first_parameters import first_parameters
from moi_jax.checkpoints.init_from import open_start
from moi_jax.checkpoints.parameters import read_state
from moi_jax.common.errors import UserError
from moi_jax.models.decoder import Tree
from moi_jax.training.audit.finding import NotDone
from moi_jax.training.audit.saved_run import PlannedRun, SavedRun, SavedStep
from moi_jax.training.audit.windows import Record
from moi_jax.training.batches import placed_batches
from moi_jax.training.metrics import StepWindow
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.resume import FIRST_POSITION
from moi_jax.training.spikes import LossLimit
from moi_jax.training.state import TrainState, abstract_state, new_state
from moi_jax.training.step import make_train_step

CLOCKED = ("tokens_per_second", "loss_tokens_per_second")


@dataclass(frozen=True)
class Stretch:
    """`count` steps from `start` on, at most those up to the checkpoint `end`.

    Attributes:
      start: None for the start of the run.
    """

    start: SavedStep | None
    end: SavedStep
    count: int

    @property
    def first(self) -> int:
        """The number of steps before the stretch."""
        return self.start.step if self.start else 0

    @property
    def last(self) -> int:
        return self.first + self.count

    @property
    def whole(self) -> bool:
        """Whether it reaches `end`."""
        return self.last == self.end.step

    @property
    def compute_dtype(self) -> str:
        return self.end.config.model.compute_dtype

    @property
    def origin(self) -> str:
        return f"checkpoint {self.first}" if self.start else "the start of the run"

    def __str__(self) -> str:
        between = self.end.step - self.first
        what = f"{between} steps" if self.whole else f"the first {self.count} of {between} steps"
        return f"{what} from {self.origin}"


@dataclass(frozen=True)
class Replayed:
    """What a replay gives.

    Attributes:
      records: the figures of the logged steps, without those of the clock.
      abstract: shapes and shardings of the two items of `state`.
      learning_rates: the sum over all steps.
    """

    state: TrainState
    abstract: tuple[Tree, Any]
    records: list[Record]
    learning_rates: float


def choose_stretch(run: SavedRun, most: int) -> Stretch:
    """The newest two checkpoints at most `most` steps apart, or the first steps between two.

    Raises:
      NotDone: only one checkpoint is kept since settings changed, more than `most` steps from the
        start of the run.
    """
    pairs = [
        (older, newer)
        for older, newer in zip(run.steps[1:], run.steps, strict=False)
        if older.step >= run.unchanged_since
    ]
    for older, newer in pairs:
        if (apart := newer.step - older.step) <= most:
            return Stretch(older, newer, apart)
    if pairs:
        return Stretch(*pairs[0], most)
    if run.unchanged_since:
        raise NotDone(
            f"only checkpoint {run.newest.step} is kept with its settings, which changed after "
            f"step {run.unchanged_since}"
        )
    if run.newest.step <= most:
        return Stretch(None, run.newest, run.newest.step)
    raise NotDone(
        f"only checkpoint {run.newest.step} is kept; --steps {run.newest.step} replays from the "
        f"start of the run"
    )


def replay(run: SavedRun, data: PlannedRun, stretch: Stretch, logged: set[int]) -> Replayed:
    """Takes the steps of a stretch again, with the batches and the step function of training.

    Args:
      logged: the steps of the records to make.
    """
    config, model, names = run.config, run.experiment.model, data.dataset.corpus.names
    optimizer = make_optimizer(config.optimizer, model)
    abstract = abstract_state(model, optimizer, config.param_dtype, run.mesh).items()
    if stretch.start:
        items = read_state(stretch.start.path, model, *abstract, run.base)
        state = TrainState.from_items(optimizer.trained, *items)
    else:
        state = new_state(model, optimizer, _first_parameters(run), run.mesh)
    schedule = make_schedule(config.optimizer, data.plan.total_steps)
    step = make_train_step(
        model,
        run.bind,
        optimizer,
        schedule,
        len(names),
        run.mesh,
        config.optimizer.gradient_dtype,
    )
    position = stretch.start.position if stretch.start else FIRST_POSITION
    row, limit = position["row"], LossLimit(config.train.max_loss_ratio, position.get("losses", ()))
    batches = placed_batches(data.dataset, data.plan, row, run.microbatch_rows, run.mesh)
    window, records, rates = StepWindow(names, config.data.sequence_length), [], 0.0
    for number in range(stretch.first + 1, stretch.last + 1):
        state, on_device = step(state, next(batches), limit.before(number))
        metrics = jax.device_get(on_device)
        next_row = min(row + config.train.global_batch_rows, data.plan.total_rows)
        if metrics["applied"]:
            limit.add(number, float(metrics["loss"]))
            window.add(metrics, next_row - row)
        row, rates = next_row, rates + float(metrics["learning_rate"])
        if number in logged and not window.empty:
            records.append(_record(number, window, metrics))
            window.restart()
    return Replayed(state, abstract, records, rates)


def _record(step: int, window: StepWindow, metrics: dict[str, Any]) -> Record:
    figures = {key: value for key, value in window.record().items() if key not in CLOCKED}
    own = {key: float(metrics[key]) for key in ("learning_rate", "grad_norm")}
    return {"step": step, **own, **figures}


def _first_parameters(run: SavedRun) -> Tree:
    """The parameters that the run began with.

    Raises:
      NotDone: they are published weights, or not there any more.
    """
    config, model = run.config, run.experiment.model
    seed, dtype = config.train.seed, config.param_dtype
    if config.model.init_from is None:
        return first_parameters(None, model, seed, dtype, run.mesh)[0]
    try:
        start = open_start(config.model.init_from)
        if start.source is None:
            return first_parameters(start.name, model, seed, dtype, run.mesh)[0]
        reason = "they are published weights"
    except UserError as error:
        reason = str(error)
    raise NotDone(
        f"only checkpoint {run.newest.step} is kept, and a replay from the start of the run needs "
        f"the weights of model.init_from ({reason})"
    )

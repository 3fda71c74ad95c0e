"""A whole run as a library function; a process or notebook may call it many times."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moi_jax.checkpoints.damaged_steps import set_aside_damaged_steps
from moi_jax.checkpoints.experiment import Experiment, open_experiment
from moi_jax.checkpoints.local_replicas import check_replicas
from moi_jax.checkpoints.local_saves import local_saves
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common import deterministic
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.common.retry import retried
from moi_jax.config import Config
from moi_jax.data.dataset import Dataset, open_dataset
from moi_jax.models.compute import make_compute
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, make_model
from moi_jax.models.presets import preset
from moi_jax.models.trained import trained_parameters
from moi_jax.parallel import hosts
from moi_jax.parallel.context import check_sequence
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import check_rows
from moi_jax.parallel.stuck import ending_when_stuck
from moi_jax.training.goodput import Clock
from moi_jax.training.loop import fit
from moi_jax.training.report import write_report
from moi_jax.training.resume import flat_settings
from moi_jax.training.run import Evaluations, NoEvaluations, Run
from moi_jax.training.run_directory import move_aside, run_directory
from moi_jax.training.sharding import undivided_line
from moi_jax.training.start import start_run
from moi_jax.training.state import TrainState
from moi_jax.training.stored_run import LocalRun, stored_run

log = logging.getLogger(__name__)

# (experiment, its data, parameters -> model, mesh, run directory) -> the evaluations of the model
# while it trains.
MakeEvaluations = Callable[[Experiment, Dataset, Bind, Mesh, Path], Evaluations]


@dataclass(frozen=True)
class TrainResult:
    """The result of a call of `train`.

    Attributes:
      step: the number of global batches seen.
      finished: whether the run is at its end. If not, it was stopped, and the next call resumes
        it from `checkpoint`.
      state: parameters and optimizer state, on the mesh.
      metrics: the last record of metrics.jsonl.
      directory: the run directory.
      checkpoint: the checkpoint of `step`.
      report: report.html of the run.
    """

    step: int
    finished: bool
    state: TrainState
    metrics: dict[str, Any]
    directory: Path
    checkpoint: Path
    report: Path


def train(
    config: Config,
    *,
    make_evaluations: MakeEvaluations | None = None,
    devices: Sequence[jax.Device] | None = None,
    fresh: bool = False,
    allow_change: bool = False,
    strict_resume: bool = False,
    stop: AbstractContextManager[Callable[[], bool]] | None = None,
    stuck_seconds: int = 0,
) -> TrainResult:
    """Trains as the config says, or resumes the run in its run directory.

    Processes that were joined (see `moi_jax.parallel.joining`) call it together, and train one run.

    Args:
      make_evaluations: see `moi_jax.evaluation.while_training`; None evaluates nothing.
      devices: the devices of the mesh; None means all devices. jax is asked for them when the
        run directory is held, since it may wait for other hosts or for the accelerator.
      fresh: start over; an old run is moved aside.
      allow_change: resume although optimizer, batch size, length or patience changed.
      strict_resume: refuse if the newest checkpoint is damaged; else resume from the one before.
      stop: a context manager, entered before the first step. It yields a function that is called
        after each step; if it returns true, the run saves and ends.
      stuck_seconds: see `ending_when_stuck`, which ends the whole process; 0 means no limit.

    Raises:
      UserError: config, data, checkpoint or run directory are wrong or do not fit together.
    """
    if config.train.deterministic and not deterministic.is_deterministic():
        raise UserError(
            f"train.deterministic needs XLA_FLAGS={deterministic.FLAG} before jax starts; set it "
            f"in the environment, or train with python -m moi_jax.train, which does"
        )
    if config.model.preset:
        preset(config.model.preset)  # an unknown one is refused before the run directory is made
    flags = {"fresh": fresh, "allow_change": allow_change, "strict_resume": strict_resume}
    hosts.check_same_code(flags | flat_settings(config.model_dump(mode="json")))
    cache_dir = config.data.cache_dir
    with (
        Clock().running() as clock,
        run_directory(config.logging.run_dir, fresh) as directory,
        stored_run(config, directory, fresh, strict_resume) as stored,
    ):
        if not fresh:
            hosts.from_main(
                "the checkpoints",
                lambda: set_aside_damaged_steps(
                    directory / "checkpoints",
                    config.checkpoint.verify,
                    strict_resume,
                    stored.fetch_again,
                ),
            )
        with hosts.one_first(cache_dir, "opening the model and the tokenizer"):
            experiment = open_experiment(config, None if fresh else directory)
        # A pattern that fits no parameter is refused before the data is prepared.
        trained_parameters(experiment.model, config.optimizer.frozen)
        devices = jax.devices() if devices is None else devices
        experiment = experiment.on_platform(devices[0].platform)
        mesh, bind, microbatch_rows = model_on_mesh(experiment.config, experiment.model, devices)
        if config.checkpoint.local_every:
            check_replicas(mesh)
        with hosts.one_first(cache_dir, "preparing the data"):
            dataset = open_dataset(experiment.config, experiment.tokenizer)
        evaluations: Evaluations = NoEvaluations()
        if make_evaluations:
            evaluations = make_evaluations(experiment, dataset, bind, mesh, directory)
        if fresh:
            _refuse_to_move(config.model.init_from, directory)
            hosts.from_main("the run directory", lambda: move_aside(directory))
        opened = RunCheckpoints(directory / "checkpoints", config.checkpoint, experiment.items)
        # Closed in any case, also after an error: this waits for a save that is in progress.
        with (
            closing(opened) as checkpoints,
            local_saves(config.checkpoint, directory, mesh) as local,
            jax.set_mesh(mesh),
        ):
            run = start_run(
                experiment, dataset, bind, mesh, microbatch_rows, checkpoints, local, evaluations,
                allow_change, clock,
            )  # fmt: skip
            if run.finished and run.step == run.steps:
                log.info("the run in %s is complete; use --fresh to start over", directory)
            elif run.finished:
                log.info(
                    "the run in %s stopped early at step %d: %s; use --fresh to start over",
                    directory, run.step, run.early_stopping,
                )  # fmt: skip
            with stop or nullcontext(lambda: False) as should_stop:
                _fit(run, checkpoints, stored, should_stop, stuck_seconds)
                report = directory / "report.html"
                hosts.from_main("the report", lambda: _report(report, config))
        return TrainResult(
            step=run.step,
            finished=run.finished,
            state=run.state,
            metrics=run.log.last,
            directory=directory,
            checkpoint=directory / "checkpoints" / str(run.step),
            report=report,
        )


def model_on_mesh(
    config: Config, model: ModelConfig, devices: Sequence[jax.Device]
) -> tuple[Mesh, Bind, int]:
    """Returns the mesh, parameters -> model, and the number of rows of a microbatch.

    Args:
      config: with the dtype of the platform, see `Experiment.on_platform`.
      devices: of this run, or of an abstract topology.

    Raises:
      UserError: devices, rows and mesh do not fit together.
    """
    mesh = make_mesh(config.mesh, devices)
    rows = config.train.microbatch_rows or config.train.global_batch_rows
    name = "train.microbatch_rows" if config.train.microbatch_rows else "train.global_batch_rows"
    check_rows(rows, mesh, name)
    check_sequence(config.data.sequence_length, mesh, "data.sequence_length")
    if undivided := undivided_line(model, mesh.shape):
        log.warning(f"{undivided}; --print-sharding shows what a device holds of each parameter")
    compute = make_compute(config.model, model, devices[0], mesh)
    return mesh, make_model(model, compute), rows


def _fit(
    run: Run,
    checkpoints: RunCheckpoints,
    stored: LocalRun,
    should_stop: Callable[[], bool],
    stuck_seconds: int,
) -> None:
    """Trains; whatever happens, the last save is then complete, and sent."""
    try:
        with ending_when_stuck(stuck_seconds, stored.checked(should_stop)) as watched:
            try:
                fit(run, watched)
            finally:  # while a signal is still noted: it must not cut this off
                checkpoints.wait()
    finally:  # nor this, which may take longer than a run that is not stuck
        stored.send()


def _report(report: Path, config: Config) -> None:
    """Writes the report; its store may fail for a while."""
    retried(report, config.checkpoint.retry_seconds, lambda: write_report(report.parent))


def _refuse_to_move(init_from: Path | None, directory: Path) -> None:
    """Raises UserError if --fresh would move the checkpoint from which the new run starts."""
    if init_from is None:
        return
    source, moved = expand_home(init_from).resolve(), directory.resolve()
    if moved == source or moved in source.parents:
        raise UserError(
            f"--fresh would move {init_from}, the checkpoint of model.init_from, aside; copy it "
            f"elsewhere first"
        )

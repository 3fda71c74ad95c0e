"""Starts or resumes a run: builds its `Run` from an experiment and its data."""

import dataclasses
import json
import logging
from pathlib import Path

from jax.sharding import Mesh

from moi_jax.checkpoints.experiment import Experiment
from moi_jax.checkpoints.first_parameters import first_parameters
from moi_jax.checkpoints.items import Base, find_step
from moi_jax.checkpoints.local_history import forget_copies
from moi_jax.checkpoints.local_saves import LocalSaves
from moi_jax.checkpoints.moved_base import read_base_again
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.data.dataset import Dataset
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.flops import causal_pairs
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import merge_trees
from moi_jax.parallel import hosts
from moi_jax.training.batches import placed_batches
from moi_jax.training.device_figures import DeviceFigures
from moi_jax.training.early_stopping import EarlyStopping
from moi_jax.training.goodput import Clock
from moi_jax.training.metrics import MetricsLog, Record, truncate_after
from moi_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
from moi_jax.training.profiling import StepProfiler
from moi_jax.training.resume import (
    plan_fingerprint,
    resume_plan,
    resume_position,
    saved_position,
)
from moi_jax.training.run import Evaluations, Run
from moi_jax.training.saved import Saved, newest_saved
from moi_jax.training.spikes import LossLimit
from moi_jax.training.state import TrainState, abstract_state, new_state
from moi_jax.training.step import make_train_step

log = logging.getLogger(__name__)


def start_run(
    experiment: Experiment,
    dataset: Dataset,
    bind: Bind,
    mesh: Mesh,
    microbatch_rows: int,
    checkpoints: RunCheckpoints,
    local: LocalSaves | None,
    evaluations: Evaluations,
    allow_change: bool,
    clock: Clock,
) -> Run:
    """Starts a new run in the directory of `checkpoints`, or resumes the run there from the newest.

    A newer step of `local` is taken before the newest checkpoint.
    The directory does not change before it is certain that the run can start.

    Raises:
      UserError: the directory holds another run, a checkpoint does not fit, or early stopping is
        set without held-out evaluations.
    """
    config, model = experiment.config, experiment.model
    if config.train.early_stopping_patience and evaluations.held_out is None:
        raise UserError(
            "train.early_stopping_patience needs held-out losses; pass make_evaluations to train()"
        )
    directory = checkpoints.directory.parent
    optimizer = make_optimizer(config.optimizer, model)
    abstract = abstract_state(model, optimizer, config.param_dtype, mesh).items()
    saved = newest_saved(checkpoints, local, abstract)
    position = resume_position(directory, saved, experiment, dataset, allow_change)
    plan = resume_plan(dataset, position, directory)
    hosts.check_same({"data": dataset.fingerprint, "plan": plan_fingerprint(plan, position["row"])})
    mixture = dataset.log_mixture(plan)  # a plan that is refused is told before weights are read
    if config.optimizer.frozen or config.lora.rank:
        key = "optimizer.frozen" if config.optimizer.frozen else "lora"
        counts = map("{:,}".format, optimizer.trained.counts(model))
        log.info("%s: %s of %s parameters are trained", key, *counts)
    if saved is None:
        state, base = _new_state(experiment, optimizer, mesh)
    else:
        state, base = _saved_state(experiment, saved, optimizer, abstract[0])
        log.info("resuming from step %d in %s", saved.step, directory)
    if not config.checkpoint.save_base:
        checkpoints.items = dataclasses.replace(checkpoints.items, base=base)

    # Records past the checkpoint are dropped and logged again; without one, also those of step 0.
    logged = -1 if saved is None else saved.step
    if hosts.is_main():
        _write_description(directory, experiment, mixture)
    answers = hosts.from_main(
        "the sample answers", lambda: truncate_after(directory / "samples.jsonl", logged)[-1:]
    )
    retry_seconds = config.checkpoint.retry_seconds
    metrics_log = MetricsLog(directory, config.logging.trackers, logged, clock, retry_seconds)
    early_stopping = EarlyStopping(config, position["early_stopping"])
    missed = set(position["missed"])
    # An earlier process may have made up for some of them, and have saved no later checkpoint.
    for name in missed & _made_up(logged, metrics_log.last, answers):
        missed.remove(name)
        if name == "held_out":
            early_stopping.count(metrics_log.last)
    schedule = make_schedule(config.optimizer, plan.total_steps)
    profiled = config.train.profile_steps if hosts.is_main() else None
    run = Run(
        config=config,
        directory=directory,
        domains=dataset.corpus.names,
        steps=plan.total_steps,
        total_rows=plan.total_rows,
        state=state,
        step=position["step"],
        row=position["row"],
        skipped_in_a_row=position["skipped_in_a_row"],
        loss_limit=LossLimit(config.train.max_loss_ratio, position.get("losses", ())),
        batches=placed_batches(dataset, plan, position["row"], microbatch_rows, mesh),
        train_step=make_train_step(
            model,
            bind,
            optimizer,
            schedule,
            len(dataset.corpus.names),
            mesh,
            config.optimizer.gradient_dtype,
        ),
        position=lambda row: saved_position(experiment, dataset, plan, mesh, row),
        epoch_of=lambda row: plan.locate(row)[0],
        pairs_of=lambda first, after: causal_pairs(plan.segment_lengths(first, after)),
        devices=DeviceFigures(model, config.data.sequence_length, mesh),
        evaluations=evaluations,
        early_stopping=early_stopping,
        profiler=StepProfiler(profiled, plan.total_steps, directory / "profile"),
        checkpoints=checkpoints,
        log=metrics_log,
        clock=clock,
        missed=missed,
        local=local,
        unchanged_since=position.get("unchanged_since"),
    )
    # Last of all: a run that does not start leaves the local copies to the next start.
    if local:
        local.begin(directory, saved.path.name if saved else "", retry_seconds)
    elif hosts.is_main():  # what is there falls behind the run, and must not be taken later
        forget_copies(directory, retry_seconds)
    return run


def _write_description(directory: Path, experiment: Experiment, mixture: dict) -> None:
    """Writes the files that describe the run, before its first step."""
    atomic_write_text(directory / "mixture.json", json.dumps(mixture, indent=1))
    atomic_write_text(directory / "config.yaml", experiment.config.to_yaml())


def _made_up(step: int, record: Record, answers: list[str]) -> set[str]:
    """The evaluations of a step whose results are logged.

    Args:
      record: the last one of metrics.jsonl.
      answers: the lines of samples.jsonl.
    """
    made = {"samples"} if answers and json.loads(answers[-1])["step"] == step else set()
    if record.get("step") == step:
        keys = [key for key in record if key.startswith("eval/")]
        made |= {"held_out"} if any(key.endswith("/loss") for key in keys) else set()
        made |= {"benchmarks"} if any(key.endswith("/score") for key in keys) else set()
    return made


def _new_state(
    experiment: Experiment, optimizer: Optimizer, mesh: Mesh
) -> tuple[TrainState, Base | None]:
    """The state before the first step, and the base of its adapters: see `ModelItems.base`.

    Without model.init_from there is no checkpoint to name, so that adapters have no base.
    """
    config, model, start = experiment.config, experiment.model, experiment.start
    dtype, checkpoint, verify = config.param_dtype, None, config.checkpoint.verify
    if start:
        _check_adapters(config, start.items.model)
        with hosts.one_first(config.data.cache_dir, "importing the weights"):
            checkpoint = start.checkpoint(config.data.cache_dir)
        verify = verify and start.source is None  # else it was verified now
    elif config.lora.quantization:
        raise UserError(
            f"lora.base_dtype {config.lora.base_dtype} quantises a base; name it in model.init_from"
        )
    parameters, fingerprint = first_parameters(
        checkpoint, model, config.train.seed, dtype, mesh, verify
    )
    base = None
    if start and checkpoint:
        base = start.items.base  # where the run goes on with adapters
        if fingerprint:
            place = str(find_step(checkpoint).absolute())
            base = Base(str(start.name), place, fingerprint)
    return new_state(model, optimizer, parameters, mesh), base


def _check_adapters(config: Config, begun: ModelConfig) -> None:
    """Raises UserError where model.init_from has other adapters than the config asks for."""
    if begun.adapter and begun != adapted(begun.base, config.lora):
        raise UserError(
            f"model.init_from {config.model.init_from} has adapters of rank {begun.adapter.rank} "
            f"(alpha {begun.adapter.alpha:g}, {begun.adapter.scaling}, base "
            f"{begun.adapter.quantization or 'not quantised'}, on "
            f"{', '.join(begun.adapter.targets)}); set lora to go on with them, or merge them "
            f"first: python -m moi_jax.convert export, then import"
        )


def _saved_state(
    experiment: Experiment, saved: Saved, optimizer: Optimizer, abstract: Tree
) -> tuple[TrainState, Base | None]:
    """The state of a saved step, and the base of its adapters with the place where it is now.

    Args:
      abstract: all parameters, with their shardings.
    """
    config, model, base = experiment.config, experiment.model, saved.base
    parameters, rest = saved.restore()
    if base:
        beside, base = read_base_again(saved.path, base, config, model, abstract)
        parameters = merge_trees(parameters, beside)
    return TrainState.from_items(optimizer.trained, parameters, rest), base

"""From the inputs to a run that is ready to go on: mesh, step, state, checkpoints."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from moi_jax.checkpoints.checkpoints import RunCheckpoints, read_parameters
from moi_jax.common.console import say
from moi_jax.common.errors import UserError
from moi_jax.common.whole_files import write_whole
from moi_jax.config.load import load_config
from moi_jax.data.loader import Batch, batch_dataset
from moi_jax.data.planning.run import RunPlan
from moi_jax.models.decoder import Decoder
from moi_jax.models.parameters import Tree
from moi_jax.parallel import axes
from moi_jax.parallel.sharding import check_rows, local_rows, make_mesh, place_batch
from moi_jax.training import run_directory as runtime
from moi_jax.training.inputs import Inputs, Resolved
from moi_jax.training.loop import Evaluate, Run
from moi_jax.training.metrics import MetricsLog, truncate_after
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.state import abstract_state, new_state, random_parameters
from moi_jax.training.step import make_eval_step, make_train_step

# Where a run without a checkpoint begins.
FIRST_POSITION: dict[str, Any] = {"step": 0, "row": 0, "epoch_rows": [0], "skipped_in_a_row": 0}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The model on its mesh, before there are parameters."""

    mesh: Mesh
    make_model: Callable[[Tree], Decoder]
    microbatch_rows: int
    row_multiple: int
    sums: Callable[[Tree, Batch], dict[str, np.ndarray]]  # of a numpy batch


def build_machine(resolved: Resolved) -> Machine:
    """Raises UserError when devices, rows and mesh do not fit together."""
    config, model = resolved.config, resolved.model
    mesh = make_mesh(config.mesh)
    rows = config.train.microbatch_rows or config.train.global_batch_rows
    name = "train.microbatch_rows" if config.train.microbatch_rows else "train.global_batch_rows"
    check_rows(rows, mesh, name)
    make_model = partial(
        Decoder, model, compute_dtype=config.model.compute_dtype, remat=config.model.remat
    )
    eval_step = make_eval_step(model, make_model, len(config.data.domains), mesh)

    def sums(parameters: Tree, batch: Batch) -> dict[str, np.ndarray]:
        count = len(batch.tokens)
        held = local_rows(count, count, mesh)
        placed = place_batch(Batch(*(array[held] for array in batch)), held, count, mesh)
        return jax.device_get(eval_step(parameters, placed))

    replicas = math.prod(mesh.shape[axis] for axis in axes.RULES["batch"])
    return Machine(mesh, make_model, rows, replicas, sums)


def start_run(
    inputs: Inputs,
    machine: Machine,
    checkpoints: RunCheckpoints,
    allow_change: bool,
    evaluate: Evaluate | None,
    benchmark: Evaluate | None,
    sample: Callable[[Tree], list[dict[str, str]]] | None,
    console: Console,
) -> Run:
    """A new run beside its `checkpoints`, or the one begun there, at the newest of them.

    Nothing there changes before it is sure that the run can go on.

    Raises:
      UserError: the run there is another one, or a checkpoint does not fit.
    """
    config, model, mesh = inputs.config, inputs.model, machine.mesh
    directory = checkpoints.directory.parent
    saved_step = checkpoints.latest()
    position = _position(checkpoints, saved_step, inputs, directory, allow_change, console)
    plan = _planned(inputs, position, directory)
    optimizer = make_optimizer(config.optimizer, model)
    if saved_step is None:
        state = new_state(model, optimizer, _first_parameters(inputs, mesh), mesh)
    else:
        abstract = abstract_state(model, optimizer, config.model.param_dtype, mesh)
        state = checkpoints.restore(saved_step, abstract)
        say(console, f"going on from step {saved_step} in {directory}")

    mixture = inputs.show_mixture(plan, console)
    write_whole(directory / "mixture.json", json.dumps(mixture, indent=1))
    write_whole(directory / "config.yaml", config.to_yaml())
    # What was logged past the checkpoint is logged again; without one, also what stands at 0.
    logged = -1 if saved_step is None else saved_step
    truncate_after(directory / "samples.jsonl", logged)
    schedule = make_schedule(config.optimizer, plan.total_steps)
    return Run(
        config=config,
        directory=directory,
        domains=inputs.corpus.names,
        steps=plan.total_steps,
        total_rows=plan.total_rows,
        state=state,
        step=position["step"],
        row=position["row"],
        skipped_in_a_row=position["skipped_in_a_row"],
        batches=_placed_batches(inputs, plan, position["row"], machine),
        train_step=make_train_step(
            model, machine.make_model, optimizer, schedule, len(inputs.corpus.names), mesh
        ),
        position=lambda row: _saved_position(inputs, plan, row),
        epoch_of=lambda row: plan.locate(row)[0],
        evaluate=evaluate,
        benchmark=benchmark,
        sample=sample,
        checkpoints=checkpoints,
        log=MetricsLog(directory, config.logging.trackers, logged),
        stop=runtime.StopSignal(config.checkpoint.grace_seconds),
        console=console,
    )


def _position(
    checkpoints: RunCheckpoints,
    saved_step: int | None,
    inputs: Inputs,
    directory: Path,
    allow_change: bool,
    console: Console,
) -> dict[str, Any]:
    """Where the run goes on, once it is known to be the same run."""
    if saved_step is None:
        if (directory / "config.yaml").exists():  # killed before its first checkpoint
            before = load_config(directory / "config.yaml").model_dump(mode="json")
            runtime.check_resume(directory, before, inputs.config, allow_change, console)
        return FIRST_POSITION
    before = checkpoints.read_json(saved_step, "config")
    # Its own checkpoint holds all that was taken from the base.
    may_change = (*runtime.MAY_CHANGE, "model.init_from")
    runtime.check_resume(directory, before, inputs.config, allow_change, console, may_change)
    position = checkpoints.read_json(saved_step, "position")
    runtime.check_fingerprints(directory, position["fingerprints"], inputs.fingerprints)
    return position


def _planned(inputs: Inputs, position: dict[str, Any], directory: Path) -> RunPlan:
    """The plan of the run from its position on.

    Raises:
      UserError: the epoch was planned otherwise, or the run is beyond its end.
    """
    config, step, row = inputs.config, position["step"], position["row"]
    plan = RunPlan(inputs.corpus, config.data, config.train, position["epoch_rows"], step, row)
    if step:
        now = {"the epoch's plan": _plan_fingerprint(plan, row)}
        runtime.check_fingerprints(directory, {"the epoch's plan": position["plan"]}, now)
    if plan.total_steps < step:
        raise UserError(
            f"{directory} stands at step {step}, past the {plan.total_steps} steps that train now "
            f"asks for; ask for more, or --fresh to begin anew"
        )
    return plan


def _saved_position(inputs: Inputs, plan: RunPlan, row: int) -> dict[str, Any]:
    """What a checkpoint keeps of the data when `row` is the first row of the next batch."""
    return {
        "row": row,
        "epoch_rows": plan.first_rows(max(row - 1, 0)),
        "plan": _plan_fingerprint(plan, row),
        "seed": inputs.config.train.seed,
        "fingerprints": inputs.fingerprints,
    }


def _plan_fingerprint(plan: RunPlan, row: int) -> str:
    """Of the plan of the epoch that the last row before `row` lies in."""
    return plan.epoch_plan(plan.locate(max(row - 1, 0))[0]).fingerprint


def _first_parameters(inputs: Inputs, mesh: Mesh) -> Tree:
    """Those of model.init_from, or random ones."""
    config = inputs.config
    if config.model.init_from:
        return read_parameters(config.model.init_from, inputs.model, config.model.param_dtype, mesh)
    return random_parameters(inputs.model, config.train.seed, config.model.param_dtype, mesh)


def _placed_batches(inputs: Inputs, plan: RunPlan, row: int, machine: Machine) -> Iterator[Batch]:
    """The run's batches from `row` on, on the mesh as [A, M, S]."""
    rows = machine.microbatch_rows
    held = local_rows(plan.batch_rows, rows, machine.mesh)
    for batch in batch_dataset(inputs.row_source(plan), row, held):
        yield place_batch(batch, held, rows, machine.mesh)

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

from moi_jax.console import say
from moi_jax.data.loader import Batch, batch_dataset
from moi_jax.data.plan import RunPlan
from moi_jax.models import axes
from moi_jax.models.decoder import Decoder
from moi_jax.models.parameters import Tree
from moi_jax.training import runtime
from moi_jax.training.checkpoints import RunCheckpoints, read_parameters
from moi_jax.training.inputs import Inputs, Resolved
from moi_jax.training.loop import Run
from moi_jax.training.metrics import MetricsLog, truncate_after
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.sharding import check_rows, local_rows, make_mesh, place_batch
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
    directory: Path,
    allow_change: bool,
    evaluate: Callable[[Tree], dict[str, float]] | None,
    sample: Callable[[Tree], list[dict[str, str]]] | None,
    console: Console,
) -> Run:
    """A new run in an empty `directory`, or the one begun there, at its newest checkpoint.

    Raises:
      UserError: the run there is another one, or a checkpoint does not fit.
    """
    config, model, mesh = inputs.config, inputs.model, machine.mesh
    checkpoints = RunCheckpoints(directory / "checkpoints", config.checkpoint, inputs.items)
    saved_step = checkpoints.latest()
    position = FIRST_POSITION
    if saved_step is not None:
        runtime.check_resume(directory, config, allow_change, console)
        position = checkpoints.read_json(saved_step, "position")
        runtime.check_fingerprints(directory, position["fingerprints"], inputs.fingerprints)
        say(console, f"going on from step {saved_step} in {directory}")
    step, row = position["step"], position["row"]
    plan = RunPlan(inputs.corpus, config.data, config.train, position["epoch_rows"], step, row)
    if saved_step is not None:
        _check_plan(directory, plan, position)
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    statistics = inputs.show_mixture(plan, console)
    (directory / "mixture.json").write_text(json.dumps(statistics, indent=1), encoding="utf-8")
    steps = plan.total_steps
    optimizer = make_optimizer(config.optimizer, model)
    if saved_step is None:
        state = new_state(model, optimizer, _first_parameters(inputs, mesh), mesh)
    else:
        abstract = abstract_state(model, optimizer, config.model.param_dtype, mesh)
        state = checkpoints.restore(saved_step, abstract)
    # What was logged past the checkpoint is logged again; without one, also what stands at 0.
    logged = -1 if saved_step is None else saved_step
    truncate_after(directory / "samples.jsonl", logged)
    schedule = make_schedule(config.optimizer, steps)
    return Run(
        config=config,
        directory=directory,
        domains=inputs.corpus.names,
        steps=steps,
        total_rows=plan.total_rows,
        state=state,
        step=step,
        row=row,
        skipped_in_a_row=position["skipped_in_a_row"],
        batches=_placed_batches(inputs, plan, row, machine),
        train_step=make_train_step(
            model, machine.make_model, optimizer, schedule, len(inputs.corpus.names), mesh
        ),
        position=lambda row: {
            "row": row,
            "epoch_rows": plan.first_rows(max(row - 1, 0)),
            "plan": _plan_fingerprint(plan, row),
            "seed": config.train.seed,
            "fingerprints": inputs.fingerprints,
        },
        epoch_of=lambda row: plan.locate(row)[0],
        evaluate=evaluate,
        sample=sample,
        checkpoints=checkpoints,
        log=MetricsLog(directory, config.logging.trackers, logged),
        stop=runtime.StopSignal(config.checkpoint.grace_seconds),
        console=console,
    )


def _plan_fingerprint(plan: RunPlan, row: int) -> str:
    """Of the plan of the epoch that the last row before `row` lies in."""
    return plan.epoch_plan(plan.locate(max(row - 1, 0))[0]).fingerprint


def _check_plan(directory: Path, plan: RunPlan, position: dict[str, Any]) -> None:
    now = {"the epoch's plan": _plan_fingerprint(plan, position["row"])}
    runtime.check_fingerprints(directory, {"the epoch's plan": position["plan"]}, now)


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

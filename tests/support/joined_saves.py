"""Saves of joined processes, one of which cannot write its files."""

import contextlib
import dataclasses
import itertools
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moi_jax.checkpoints.items import ModelItems, all_steps
from moi_jax.checkpoints.run_checkpoints import CannotSave, RunCheckpoints
from moi_jax.config.load import make_config
from moi_jax.models.presets import PRESETS
from moi_jax.training.early_stopping import EarlyStopping
from moi_jax.training.saves import save

RETRY_SECONDS = 3  # two more tries
STEPS = 1000  # within which a failure must be noticed


def mesh_of_all() -> Mesh:
    return Mesh(jax.devices(), ("data",))


class State:
    """A state that is split over two processes, and whose values are the step."""

    def __init__(self, step: int):
        rows = NamedSharding(mesh_of_all(), PartitionSpec("data"))
        part = np.full((4, 64), step, np.float32)
        table = jax.make_array_from_callback((8, 64), rows, lambda _: part)
        self.parameters = {"embedding": {"table": table}}

    def items(self):
        return self.parameters, {"state": self.parameters["embedding"]["table"] + 1}


def save_twice(directory: Path, fails: bool, passes: bool) -> None:
    """Prints the steps that are whole in the end, and what this process reads of the newest.

    Args:
      fails: whether this process cannot write the second checkpoint.
      passes: whether it can again when the failure is noticed.
    """
    config = make_config({"checkpoint": {"retry_seconds": RETRY_SECONDS}})
    model = dataclasses.replace(PRESETS["tiny"], num_layers=1, hidden_size=8, vocab_size=16)
    opened = RunCheckpoints(directory, config.checkpoint, ModelItems(model, {}, {}))
    with contextlib.closing(opened) as checkpoints, jax.set_mesh(mesh_of_all()):
        run = SimpleNamespace(
            config=config, checkpoints=checkpoints, step=1, state=State(1), row=0,
            skipped_in_a_row=0, early_stopping=EarlyStopping(config, {}), missed=set(),
            unchanged_since=0, loss_limit=SimpleNamespace(ratio=None),
            position=lambda row: {"row": row}, log=SimpleNamespace(write=lambda record: None),
        )  # fmt: skip
        save(run, {}, complete=True)
        if fails:
            limit_files(100)
        run.step, run.state = 2, State(2)
        save(run, {})
        failure = take_steps(run)
        if passes:
            limit_files(resource.RLIM_INFINITY)
        save(run, {}, failure, complete=True)
        print("whole", *[step.name for step in all_steps(directory)], "at step", run.step)
        print("holds", values_of(checkpoints, run.step))


def take_steps(run: SimpleNamespace) -> CannotSave:
    """Takes steps until the failure is noticed."""
    for step in itertools.count(3):
        assert step < STEPS
        time.sleep(0.1)
        run.step, run.state = step, State(step)
        if failure := run.checkpoints.failure():
            return failure


def values_of(checkpoints: RunCheckpoints, step: int) -> set[float]:
    parameters, _ = checkpoints.restore(step, *State(0).items())
    shards = parameters["embedding"]["table"].addressable_shards
    return {float(value) for shard in shards for value in np.ravel(shard.data)}


def limit_files(size: int) -> None:
    """Lets this process write no file beyond a size, as if the disk were full for it alone."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

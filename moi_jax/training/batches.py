"""The batches of a run, from any row on: as numpy arrays, or placed on a mesh."""

from collections.abc import Iterator
from pathlib import Path

from jax.sharding import Mesh

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.config.load import load_config
from moi_jax.data.dataset import Dataset, open_dataset
from moi_jax.data.loader import Batch, batch_dataset
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.parallel.placing import local_rows, place_batch


def batches(config: Config | str | Path, start_row: int = 0) -> Iterator[Batch]:
    """The numpy batches of a run from a global row on: rows [start_row, start_row + B), ...

    Args:
      config: a Config, or the path of a config file.
      start_row: 0 or more. After the run's last row there are no batches.

    Raises:
      UserError: config, data or checkpoint are wrong, as in the training command, or there is no
        such row.
    """
    if start_row < 0:
        raise UserError(f"start_row {start_row} is below 0; rows are counted from 0")
    if not isinstance(config, Config):
        config = load_config(config)
    experiment = open_experiment(config)
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    return iter(batch_dataset(dataset.batch_reader(dataset.plan()), start_row))


def placed_batches(
    dataset: Dataset, plan: TrainingPlan, row: int, microbatch_rows: int, mesh: Mesh
) -> Iterator[Batch]:
    """Yields batches [A, M, S] on the mesh, from `row` on. Each host reads only its own rows."""
    held = local_rows(plan.batch_rows, microbatch_rows, mesh)
    for batch in batch_dataset(dataset.batch_reader(plan), row, held):
        yield place_batch(batch, held, microbatch_rows, mesh)

"""The moving average that a run keeps of its parameters (optimizer.ema_decay) as a checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np

from moi_jax.checkpoints.checksums import verify_arrays
from moi_jax.checkpoints.combined import write_combined
from moi_jax.checkpoints.damage import reading
from moi_jax.checkpoints.items import find_step, read_items, read_json_item
from moi_jax.checkpoints.parameter_files import StoredParameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.atomic_files import check_new
from moi_jax.common.errors import UserError
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.trained import trained_parameters

# Where the state of a step has it: `Averaged` in training/optimizer.py.
AVERAGE = "state.average."


def write_moving_average(checkpoint: Path, out: Path, verify: bool = True) -> None:
    """Writes the moving average in a training step as a checkpoint of the same kind.

        write_moving_average(Path("runs/qwen_7b_moi"), Path("averaged"))

    Frozen parameters and layers are those of the step. The dtype is that of its parameters.

    Args:
      checkpoint: a step of a run with optimizer.ema_decay, or the run (its newest step).
      verify: compare the files with their checksums first.

    Raises:
      UserError: the step keeps no average or is damaged, or `out` exists or cannot be written.
        Nothing is left behind.
    """
    check_new(out)
    step = find_step(checkpoint).absolute()
    items = read_items(step)
    settings = read_json_item(step, "config")["optimizer"] if (step / "config").is_dir() else {}
    if not settings.get("ema_decay"):
        raise UserError(
            f"{step} keeps no moving average (optimizer.ema_decay); average the checkpoints of a "
            f"run with: python -m moi_jax.convert average RUN --ema DECAY"
        )
    trained = trained_parameters(items.model, settings["frozen"])
    stored = stored_parameters(step, items.model, verify)
    if verify:
        verify_arrays(step, ["optimizer"])
    with reading(step, "optimizer"):
        average = StoredParameters(step, [AVERAGE + path for path in trained.paths], "optimizer")

    def get(path: str, layer: int | None) -> np.ndarray:
        place = trained.place(path, layer)
        if path not in trained.paths or (layer is not None and place is None):
            return stored.get(path, layer)
        return average.get(AVERAGE + path, place)

    provenance = {**items.provenance, "combined": {"method": "ema_decay", "of": [str(step)]}}
    specs = parameter_specs(items.model)
    held = [path for path in stored.arrays if not specs[path].adapter] or list(stored.arrays)
    dtype = np.result_type(*map(stored.dtype_of, held))
    write_combined(out, dataclasses.replace(items, provenance=provenance), dtype, get)

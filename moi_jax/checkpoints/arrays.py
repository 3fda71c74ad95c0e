"""Reads an item of arrays of a checkpoint onto a mesh."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from moi_jax.checkpoints.damage import reading
from moi_jax.checkpoints.finite import check_finite


def read_arrays(step: Path, item: str, abstract: Any) -> Any:
    """An item of `ARRAYS`, with the dtypes and shardings of the tree `abstract`.

    It only reads: a run may be training in the directory.

    Raises:
      UserError: files are missing or damaged, or a value is not finite.
    """
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
    with reading(step, item), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(step.absolute(), args)[item]
    check_finite(step, restored, item)
    return restored

"""The newest step of a run: a checkpoint, or a newer step on the hosts' own disks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moi_jax.checkpoints.finite import check_finite
from moi_jax.checkpoints.items import Base, read_base, read_json_item
from moi_jax.checkpoints.local_saves import LocalSaves, LocalStep
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import adapters_of
from moi_jax.parallel import hosts


@dataclass(frozen=True)
class Saved:
    """What a run resumes from.

    Attributes:
      path: the folder of the step.
      position: where the run stands in its data, and more; see training/saves.py.
      config: with which it was saved.
      base: see `ModelItems.base`.
      restore: see `RunCheckpoints.restore`, which has the step as another argument.
    """

    step: int
    path: Path
    position: dict[str, Any]
    config: dict[str, Any]
    base: Base | None
    restore: Callable[[Tree, Any], tuple[Tree, Any]]


def newest_saved(checkpoints: RunCheckpoints, local: LocalSaves | None) -> Saved | None:
    """The newest step of a run, which is the same in all processes; None if nothing is saved.

    Raises:
      UserError: it cannot be read.
    """
    step = hosts.from_main("the newest checkpoint", checkpoints.latest)
    if local and (found := local.newest(step or 0)):
        restore = partial(_restore_local, local, found, checkpoints.items.model)
        record = found.record
        return Saved(
            found.step, found.path, record["position"], record["config"], found.base, restore
        )
    if step is None:
        return None
    path = checkpoints.directory / str(step)
    position, config = (read_json_item(path, item) for item in ("position", "config"))
    restore = partial(checkpoints.restore, step)
    return Saved(step, path, position, config, read_base(path), restore)


def _restore_local(
    local: LocalSaves, found: LocalStep, model: ModelConfig, parameters: Tree, optimizer: Any
) -> tuple[Tree, Any]:
    held = adapters_of(model, parameters) if found.base else parameters
    restored = local.restore(found, (held, optimizer))
    check_finite(found.path, restored, "state")
    return restored

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
from moi_jax.training.metrics import last_step


@dataclass(frozen=True)
class Saved:
    """What a run resumes from.

    Attributes:
      path: the folder of the step.
      position: where the run stands in its data, and more; see training/saves.py.
      config: with which it was saved.
      base: see `ModelItems.base`.
      restore: reads parameters and optimizer, see `RunCheckpoints.restore`.
    """

    step: int
    path: Path
    position: dict[str, Any]
    config: dict[str, Any]
    base: Base | None
    restore: Callable[[], tuple[Tree, Any]]


def newest_saved(
    checkpoints: RunCheckpoints, local: LocalSaves | None, abstract: tuple[Tree, Any]
) -> Saved | None:
    """The newest step of a run, which is the same in all processes; None if nothing is saved.

    Args:
      abstract: parameters and optimizer, with the shardings and dtypes that the run needs.

    Raises:
      UserError: it cannot be read.
    """
    step = hosts.from_main("the newest checkpoint", checkpoints.latest)
    if local and (found := _newest_local(checkpoints, local, step or 0, abstract)):
        return found
    if step is None:
        return None
    path = checkpoints.directory / str(step)
    position, config = (read_json_item(path, item) for item in ("position", "config"))
    restore = partial(checkpoints.restore, step, *abstract)
    return Saved(step, path, position, config, read_base(path), restore)


def _newest_local(
    checkpoints: RunCheckpoints, local: LocalSaves, after: int, abstract: tuple[Tree, Any]
) -> Saved | None:
    metrics = checkpoints.directory.parent / "metrics.jsonl"
    logged = hosts.from_main("the metrics", lambda: last_step(metrics))
    held = partial(_held, checkpoints.items.model, *abstract)
    found = local.newest(after, logged, held)
    if found is None:
        return None
    position, config = found.record["position"], found.record["config"]
    restore = partial(_restore_local, local, found, held)
    return Saved(found.step, found.path, position, config, found.base, restore)


def _held(
    model: ModelConfig, parameters: Tree, optimizer: Any, beside_base: bool
) -> tuple[Tree, Any]:
    """What a local copy holds of a state, see `ModelItems.held`."""
    return adapters_of(model, parameters) if beside_base else parameters, optimizer


def _restore_local(
    local: LocalSaves, found: LocalStep, held: Callable[[bool], tuple[Tree, Any]]
) -> tuple[Tree, Any]:
    restored = local.restore(found, held(found.base is not None))
    advice = (
        f"the run resumes from its newest checkpoint when {found.path.parent}, the local copies, "
        f"is removed on all hosts, or checkpoint.local_every is null"
    )
    check_finite(found.path, restored, "state", advice)
    return restored

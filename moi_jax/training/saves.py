"""The saves of a run: one that fails is tried again, on all hosts together."""

import logging
from time import sleep
from typing import Any

from moi_jax.checkpoints.local_saves import LocalSaves
from moi_jax.checkpoints.run_checkpoints import CannotSave
from moi_jax.common.retry import pauses
from moi_jax.training.run import Run

log = logging.getLogger(__name__)


def save(
    run: Run, losses: dict[str, float], failure: CannotSave | None = None, complete: bool = False
) -> None:
    """Saves a checkpoint of the run's step, in the background.

    If this save or the one before cannot be written, the run waits a little and saves the step at
    which it stands, for checkpoint.retry_seconds. All processes then know of the failure, and do
    the same.

    Args:
      losses: the held-out losses of this step, or {}.
      failure: why the last save, of an earlier step, has failed.
      complete: whether to wait until the checkpoint is complete on disk.

    Raises:
      UserError: the checkpoint cannot be written.
    """
    failure = failure or _try(run, losses, complete)
    for pause in pauses(run.config.checkpoint.retry_seconds):
        if failure is None:
            break
        log.warning("%s; saving step %d in %.0f s", failure.why, run.step, pause)
        sleep(pause)
        failure = _try(run, losses, complete=True)
    if failure:
        raise failure
    run.log.write({"step": run.step})  # with the time that this took


def save_locally(run: Run, local: LocalSaves) -> None:
    """Saves the run's step on the hosts' own disks, in the background.

    A copy that is newer than the metrics is not taken, so these must outlive the host of process 0.
    """
    run.log.sync()
    parameters, optimizer = run.state.items()
    items = run.checkpoints.items
    state = (items.held(parameters), optimizer)
    config = run.config.model_dump(mode="json")
    local.save(run.step, state, _position(run), config, items.base)
    run.log.write({"step": run.step})  # with the time that this took


def complete_save(run: Run) -> None:
    """Waits until the last save is complete on disk, or is made up for by one of this step."""
    try:
        run.checkpoints.wait()
    except CannotSave as failure:
        save(run, {}, failure, complete=True)


def _try(run: Run, losses: dict[str, float], complete: bool) -> CannotSave | None:
    """Saves once; returns the failure of this save, or of the one before."""
    config = run.config.model_dump(mode="json")
    try:
        run.checkpoints.save(run.step, *run.state.items(), _position(run), config, losses)
        if complete:
            run.checkpoints.wait()
    except CannotSave as failure:
        return failure
    return None


def _position(run: Run) -> dict[str, Any]:
    """Where the run stands, beside its state."""
    return {
        "step": run.step,
        "skipped_in_a_row": run.skipped_in_a_row,
        "early_stopping": run.early_stopping.to_json(),
        "missed": sorted(run.missed),
        "unchanged_since": run.unchanged_since,
        **({"losses": run.loss_limit.to_json()} if run.loss_limit.ratio else {}),
        **run.position(run.row),
    }

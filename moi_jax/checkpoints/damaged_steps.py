"""Setting the damaged checkpoints of a run aside, so that it resumes from the newest sound one."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from moi_jax.checkpoints.checksums import ARRAYS, verify_arrays
from moi_jax.checkpoints.damage import DamagedCheckpoint
from moi_jax.checkpoints.items import all_steps, read_items, read_json_item
from moi_jax.common.errors import UserError

log = logging.getLogger(__name__)


def set_aside_damaged_steps(
    folder: Path, verify: bool, strict: bool, fetch_again: Callable[[Path], bool] = lambda _: False
) -> None:
    """Moves damaged steps to `folder`/damaged; warns of each, and of the steps to be repeated.

    Args:
      folder: the checkpoints of a run.
      verify: also compare parameters and optimizer with their checksums. This is done from the
        newest step on, until one is sound. Of older steps, which are not restored, only the
        small items are verified.
      strict: refuse to go back to an older step.
      fetch_again: replaces a damaged step by a sound copy; returns whether there is one.

    Raises:
      UserError: no sound step is left, `strict` is set and the newest step is damaged, or one is of
        another format. Nothing has been moved.
    """
    damaged: list[DamagedCheckpoint] = []
    sound = None
    for step in all_steps(folder):
        try:
            _check(step, verify and sound is None, fetch_again)
            sound = sound or step
        except DamagedCheckpoint as error:
            if strict and sound is None:
                raise UserError(
                    f"{step} is damaged ({error.reason}), and a strict resume goes back to no "
                    f"older checkpoint; restore it from a copy, or leave out --strict-resume"
                ) from None
            damaged.append(error)
    if damaged and sound is None:
        raise UserError(
            f"no sound checkpoint is left in {folder} (step {damaged[0].step.name}: "
            f"{damaged[0].reason}); restore one from a copy, or use --fresh to start over (the old "
            f"run is moved aside)"
        )
    for each in damaged:
        assert sound is not None
        _set_aside(each, sound)


def _check(step: Path, arrays: bool, fetch_again: Callable[[Path], bool]) -> None:
    try:
        check_step(step, arrays)
    except DamagedCheckpoint as error:
        if not fetch_again(step):
            raise
        log.warning(f"checkpoint {step.name} was damaged ({error.reason}) and is fetched again")
        check_step(step, arrays)


def check_step(step: Path, arrays: bool) -> None:
    """Raises DamagedCheckpoint where a run could not resume from the step.

    Args:
      arrays: also compare parameters and optimizer with their checksums.
    """
    for item in ARRAYS:
        if not (step / item).is_dir():
            raise DamagedCheckpoint(step, f"{item} is missing")
    read_items(step)
    for item in ("config", "position"):
        read_json_item(step, item)
    if arrays:
        verify_arrays(step)


def _set_aside(damaged: DamagedCheckpoint, sound: Path) -> None:
    step = damaged.step
    folder = step.parent / "damaged"
    folder.mkdir(exist_ok=True)
    # A damaged checkpoint of the same step may lie there already.
    aside = Path(tempfile.mkdtemp(prefix=f"{step.name}.", dir=folder))
    step.rename(aside)
    repeated = int(step.name) - int(sound.name)
    then = ""
    if repeated > 0:
        steps = "1 step" if repeated == 1 else f"{repeated} steps"
        then = f"; the run goes on from step {sound.name} and repeats {steps}"
    log.warning(f"checkpoint {step.name} is damaged ({damaged.reason}), moved to {aside}{then}")

"""Reading a checkpoint in an object store: a local copy of it is made once."""

import logging
from pathlib import Path

import filelock

from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.common.locations import location_text, staged_path
from moi_jax.storage.folders import DamagedFolder, fetch_folder, folders_among
from moi_jax.storage.store import Store

log = logging.getLogger(__name__)


def fetch_step(place: Path) -> Path:
    """The local copy of a step in a store: of `place` itself, or the newest of the run there.

    Raises:
      UserError: there is no whole step, it is damaged, or see `Store`.
    """
    names = Store(place).names()
    if SUMS not in names:
        place = place / _newest(place, names)
    store, copy = Store(place.parent), expand_home(staged_path(place, "copies"))
    copy.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{copy}.lock"):
        sums = copy / SUMS
        if not (sums.is_file() and sums.read_bytes() == store.read(f"{place.name}/{SUMS}")):
            log.info(f"fetching {location_text(place)} to {copy}")
            try:
                fetch_folder(store, place.name, copy)
            except DamagedFolder as error:
                raise UserError(
                    f"{location_text(place)} is damaged ({error}); use another checkpoint"
                ) from None
    return copy


def _newest(place: Path, names: list[str]) -> str:
    """The newest whole step below a run or a folder of steps, such as "checkpoints/20"."""
    for folder in ("", "checkpoints/"):
        below = (n.removeprefix(folder) for n in names if n.startswith(folder))
        steps = [step for step in folders_among(below)[0] if step.isdigit()]
        if steps:
            return folder + max(steps, key=int)
    raise UserError(
        f"{location_text(place)} is no checkpoint (no {SUMS} inside); give one that was written by "
        f"training or by python -m moi_jax.convert import"
    )

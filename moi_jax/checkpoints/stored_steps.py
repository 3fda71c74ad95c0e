"""The steps of a run in an object store: sent from the local disk, and fetched to an empty one."""

import logging
from pathlib import Path

from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.storage.folders import (
    DamagedFolder,
    delete_folder,
    fetch_folder,
    folders_among,
    send_folder,
)
from moi_jax.storage.store import Store

ASIDE = f"{SUMS}.damaged"

log = logging.getLogger(__name__)


class StoredSteps:
    """The steps below the folder `checkpoints` of a run in a store.

    A damaged step is set aside by renaming its SHA256SUMS: it is no step then, and its files stay.
    """

    def __init__(self, place: Path, patience: float):
        self._store = Store(place / "checkpoints", patience)
        self._sent: dict[str, bytes] | None = None  # step -> its SHA256SUMS in the store

    def fetch(self, folder: Path, strict: bool) -> None:
        """Fetches all whole steps into a local folder that has none.

        Those that are damaged are named and set aside.

        Args:
          strict: refuse to go back to an older step.

        Raises:
          UserError: no sound step is left, or `strict` is set and the newest step is damaged.
            Nothing is changed in the store. Or see `Store`.
        """
        whole, _ = self._steps()
        damaged: dict[str, DamagedFolder] = {}
        for step in whole:
            try:
                log.info(f"fetching checkpoint {step} from {self._store.url}")
                fetch_folder(self._store, step, folder / step)
            except DamagedFolder as error:
                damaged[step] = error
        self._check(whole, damaged, strict)
        for step, wrong in damaged.items():
            self._set_aside(step, wrong, sound=next(s for s in whole if s not in damaged))

    def send(self, steps: list[Path]) -> None:
        """Makes the store hold the local steps of the run, and no others.

        New ones are sent first, then those are deleted that are no longer kept here. Without a
        local step, none is deleted.

        Raises:
          UserError: see `Store`.
        """
        if self._sent is None:
            self._sent = self._look()
        for step in sorted(steps, key=lambda step: int(step.name)):
            try:
                sums = (step / SUMS).read_bytes()
                if self._sent.get(step.name) != sums:
                    send_folder(self._store, step.name, step)
                    self._sent[step.name] = sums
            except FileNotFoundError:  # retention was faster
                delete_folder(self._store, step.name)
                self._sent.pop(step.name, None)
        kept = {step.name for step in steps} & self._sent.keys()
        for name in self._sent.keys() - kept if kept else ():
            delete_folder(self._store, name)
            del self._sent[name]

    def _look(self) -> dict[str, bytes]:
        """The whole steps in the store, with their checksums; the others are deleted."""
        whole, cut_off = self._steps()
        for step in cut_off:
            log.warning(f"checkpoint {step} in {self._store.url} was not sent to its end; deleted")
            delete_folder(self._store, step)
        return {step: self._store.read(f"{step}/{SUMS}") or b"" for step in whole}

    def _steps(self) -> tuple[list[str], list[str]]:
        """The whole steps, the newest first, and those that were cut off."""
        names = self._store.names()
        whole, others = folders_among(name for name in names if name.partition("/")[0].isdigit())
        aside = {name.partition("/")[0] for name in names if name.endswith(f"/{ASIDE}")}
        return sorted(whole, key=int, reverse=True), sorted(others - aside, key=int)

    def _check(self, whole: list[str], damaged: dict[str, DamagedFolder], strict: bool) -> None:
        """Raises UserError where no step may be resumed from."""
        if not damaged:
            return
        newest = f"{self._store.url}/{whole[0]}"
        if len(damaged) == len(whole):
            raise UserError(
                f"no sound checkpoint is left in {self._store.url} (step {whole[0]}: "
                f"{damaged[whole[0]]}); restore one from a copy, or choose another logging.run_dir"
            )
        if strict and whole[0] in damaged:
            raise UserError(
                f"{newest} is damaged ({damaged[whole[0]]}), and a strict resume goes back to no "
                f"older checkpoint; restore it from a copy, or leave out --strict-resume"
            )

    def _set_aside(self, step: str, error: DamagedFolder, sound: str) -> None:
        self._store.write(f"{step}/{ASIDE}", self._store.read(f"{step}/{SUMS}") or b"")
        self._store.delete(f"{step}/{SUMS}")
        repeated = int(step) - int(sound)
        then = f"; the run goes on from step {sound} and repeats {repeated}" * (repeated > 0)
        log.warning(
            f"checkpoint {step} in {self._store.url} is damaged ({error}), its {SUMS} is renamed "
            f"to {ASIDE}{then}"
        )

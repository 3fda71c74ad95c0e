"""The steps of a run in an object store: sent from the local disk, and fetched to an empty one."""

import logging
from collections.abc import Callable
from pathlib import Path

from moi_jax.checkpoints.items import all_steps
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.storage.folders import (
    DamagedFolder,
    delete_folder,
    fetch_folder,
    folders_among,
    is_sound,
    send_folder,
)
from moi_jax.storage.store import Store

ASIDE = f"{SUMS}.damaged"

log = logging.getLogger(__name__)


class StoredSteps:
    """The steps below the folder `checkpoints` of a run in a store.

    A damaged step is set aside by renaming its SHA256SUMS: it is no step then, and its files stay.
    """

    def __init__(self, place: Path, patience: float, may_write: Callable[[], None] = lambda: None):
        self._store = Store(place / "checkpoints", patience, may_write)
        # Step -> its SHA256SUMS in the store, b"" if it was cut off there.
        self._sent: dict[str, bytes] | None = None

    def are_newer(self, folder: Path) -> bool:
        """Whether the newest whole step in the store is newer than those in a local folder.

        So it is if it has the number of the newest one there, but another content.
        """
        whole, _ = self._steps()
        if not whole or any(int(step.name) > int(whole[0]) for step in all_steps(folder)):
            return False
        return _sums(folder / whole[0]) != self._store.read(f"{whole[0]}/{SUMS}")

    def lack_any(self, folder: Path) -> bool:
        """Whether a local folder has a step that the store has not, and none that is newer."""
        whole, _ = self._steps()
        return any(
            _sums(step) != self._store.read(f"{step.name}/{SUMS}")
            for step in all_steps(folder)
            if not whole or int(step.name) >= int(whole[0])
        )

    def fetch(self, folder: Path, strict: bool) -> None:
        """Fetches all whole steps into a local folder that has none.

        Those that are damaged are named and set aside.

        Args:
          strict: refuse to go back to an older step.

        Raises:
          UserError: no sound step is left, or `strict` is set and the newest step is damaged.
            Nothing is changed in the store. Or see `Store`.
        """
        whole, cut_off = self._steps()
        if cut_off and not whole:
            raise UserError(
                f"checkpoint {cut_off[-1]} in {self._store.url} has no {SUMS}, and no other one is "
                f"whole: it was not sent to its end, or an old version wrote it; go on where the "
                f"run was written, or choose another logging.run_dir"
            )
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

    def fetch_again(self, step: Path) -> bool:
        """Replaces a local step by the one in the store, if that is sound; returns whether it is.

        Raises:
          UserError: see `Store`.
        """
        try:
            fetch_folder(self._store, step.name, step)
        except DamagedFolder:
            return False
        return True

    def send(self, steps: list[Path]) -> None:
        """Makes the store hold the local steps of the run, and no others.

        New ones are sent first, and of these the newest. Then those are deleted that are no longer
        kept here. Until a local step has arrived, none is deleted.

        Raises:
          UserError: see `Store`.
        """
        if self._sent is None:
            self._sent = self._look()
        for step in sorted(steps, key=lambda step: int(step.name), reverse=True):
            self._send_step(step, self._sent)
        kept = {step.name for step in steps if self._sent.get(step.name)}
        for name in self._sent.keys() - kept if kept else ():
            delete_folder(self._store, name)
            del self._sent[name]

    def _send_step(self, step: Path, sent: dict[str, bytes]) -> None:
        try:
            sums = (step / SUMS).read_bytes()
            if sent.get(step.name) and sent[step.name] != sums and not is_sound(step):
                log.warning(f"checkpoint {step.name} is damaged here, and is not sent")
            elif sent.get(step.name) != sums:
                sent[step.name] = b""
                send_folder(self._store, step.name, step)
                sent[step.name] = sums
        except FileNotFoundError:  # retention was faster
            if not sent.get(step.name):
                log.warning(
                    f"checkpoint {step.name} was deleted here before it had arrived in "
                    f"{self._store.url}; raise checkpoint.keep_last or checkpoint.every"
                )

    def _look(self) -> dict[str, bytes]:
        """The steps in the store, with their checksums."""
        whole, cut_off = self._steps()
        for step in cut_off:
            log.warning(
                f"checkpoint {step} in {self._store.url} was not sent to its end; it is deleted "
                f"when another one has arrived"
            )
        sums = {step: self._store.read(f"{step}/{SUMS}") or b"" for step in whole}
        return sums | dict.fromkeys(cut_off, b"")

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


def _sums(step: Path) -> bytes:
    """The SHA256SUMS of a local step; b"" if it has none."""
    file = step / SUMS
    return file.read_bytes() if file.is_file() else b""

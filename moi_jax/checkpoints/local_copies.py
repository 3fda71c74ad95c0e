"""Copies of a run's newest steps on the disk of one host: written, verified and removed.

    <folder>/<step>.<start>/<process>/   record.json, <part>.npz, ..., SHA256SUMS

A part is what one device holds of the state; devices that hold the same have one part. `start`
tells what each start of the run has written: only parts of one start belong together.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.common.atomic_files import check_writable
from moi_jax.common.checksums import check_sums, read_sums, write_sums
from moi_jax.common.errors import UserError, reason
from moi_jax.common.log import EVERY_HOST

RECORD = "record.json"
KEPT = 2  # steps, beside the one that is being written
UNFINISHED = ".unfinished"  # how a folder ends that is half written or half removed

log = logging.getLogger(__name__)

Json = dict[str, Any]
Part = dict[str, np.ndarray]  # name of a leaf -> the bytes of its shard, uint8[n]


@dataclass
class Copy:
    """What this host has of one step.

    Attributes:
      record: what was saved beside the arrays.
      parts: number of a part -> its file.
    """

    record: Json
    parts: dict[int, Path] = field(default_factory=dict)


class LocalCopies:
    """The copies of one run in a folder of this host, which several processes may share."""

    def __init__(self, folder: Path, private: bool = False):
        """Makes the folder.

        Args:
          private: whether no other user may reach the folder above it, which is made, too.

        Raises:
          UserError: it cannot be written, or others can write there.
        """
        self.folder, self._private = folder, private
        if private:
            _make_private(folder.parent)
        check_writable(folder)
        for path in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"*/*{UNFINISHED}")):
            shutil.rmtree(path, ignore_errors=True)  # of a process that was killed

    def write(self, name: str, process: int, record: Json, parts: Mapping[int, Part]) -> None:
        """Writes the parts of a process; the folder gets its name when it is whole.

        Args:
          name: <step>.<start>.

        Raises:
          OSError: the system refuses, as where the disk is full. Nothing is left then.
          UserError: other users can write there.
        """
        if self._private:  # again: something may clean up the host's temporary files
            _make_private(self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_old(step_number(name))
        whole = self.folder / name / str(process)
        unfinished = whole.with_name(f"{process}{UNFINISHED}")
        try:
            unfinished.mkdir(parents=True)
            (unfinished / RECORD).write_text(json.dumps(record), encoding="utf-8")
            for number, arrays in parts.items():
                np.savez(unfinished / f"{number}.npz", **arrays)  # type: ignore[arg-type]
            write_sums(unfinished, [RECORD, *(f"{number}.npz" for number in parts)])
            unfinished.rename(whole)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            with suppress(OSError):  # another process has written its parts there
                whole.parent.rmdir()
            raise

    def sound(self, after: int) -> dict[str, Copy]:
        """The copies of steps after `after`, by name; a warning names each that is damaged."""
        copies: dict[str, Copy] = {}
        for step in self._steps():
            for path in _content(step) if step_number(step.name) > after else ():
                try:
                    files = read_sums(path)
                    check_sums(path, files)
                    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    log.warning(
                        f"the local copy {path} on {platform.node()} is damaged and not used: "
                        f"{reason(error)}",
                        extra={EVERY_HOST: True},
                    )
                    continue
                parts = copies.setdefault(step.name, Copy(record)).parts
                parts |= {int(Path(file).stem): path / file for file in files if file != RECORD}
        return copies

    def keep_only(self, name: str) -> None:
        """Removes all steps but that one."""
        for step in self._steps():
            if step.name != name:
                _remove(step)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_old(self, next_step: int) -> None:
        """Keeps the `KEPT` newest steps before the next one.

        All processes have then written the older of these: each waits for that before it begins
        the newer one, which it has begun, since it has taken part in the next step.
        """
        numbers = {step_number(step.name) for step in self._steps()}
        before = sorted(number for number in numbers if number < next_step)
        for step in self._steps():
            if step_number(step.name) < min(before[-KEPT:], default=0):
                _remove(step)

    def _steps(self) -> Iterator[Path]:
        for path in _content(self.folder):
            if path.name.partition(".")[0].isdigit() and path.suffix != UNFINISHED:
                yield path


def _content(folder: Path) -> list[Path]:
    """What is in a folder; a warning names one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:  # something has cleaned it up
        return []
    except OSError as error:
        log.warning(
            f"the local copies in {folder} on {platform.node()} cannot be read, and are not used: "
            f"{reason(error)}",
            extra={EVERY_HOST: True},
        )
        return []


def step_number(name: str) -> int:
    """The number of the step in the name of a copy, <step>.<start>."""
    return int(name.partition(".")[0])


def _make_private(folder: Path) -> None:
    """Makes a folder that no other user can read; raises UserError if another user has made it."""
    if folder.is_symlink():  # perhaps of another user, who could let it point elsewhere
        raise UserError(
            f"{folder} is a link, and local copies need the folder itself; name that, or another "
            f"one, in checkpoint.local_dir"
        )
    with suppress(OSError):  # that it cannot be written is told later
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UserError(
                f"{folder} can be written by other users, who could change the local copies; "
                f"remove it, or name another folder in checkpoint.local_dir"
            )


def _remove(step: Path) -> None:
    """Removes a step, which is no step any more if a signal ends this process meanwhile."""
    gone = step.with_name(f"{step.name}{UNFINISHED}")
    with suppress(OSError):  # another process on this host removes it
        step.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)

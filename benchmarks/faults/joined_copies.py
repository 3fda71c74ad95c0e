"""Faults of local copies: both hosts are lost after a copy that is newer than the checkpoint.

What then happens to the copies differs. The same command must go on from the right step, and end
as a run without local copies does.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from cases import Case
from damages import find, flip
from joined_place import HOSTS, JoinedPlace, Missed, Moment
from verdicts import EXACT, WRONG, Verdict, exact, problem_of
from workplace import Done

GROUP = "local copies of two hosts"
NAMED_DAMAGE = "is damaged and not used"
_preparing = Lock()


class CopiesPlace(JoinedPlace):
    """A place whose processes hold the same parts, and have disks of their own for copies.

    Attributes:
      copied, saved: the steps of the newest copy and of the newest checkpoint at the kill.
    """

    def __init__(self, directory: Path, lab: Any):
        super().__init__(directory, lab)
        self.copied, self.saved = newest_steps(lab.steps)

    def config(self) -> str:
        return yaml.safe_dump({**yaml.safe_load(super().config()), "mesh": {"data": HOSTS}})

    def copies(self, process: int) -> Path:
        """The disk of a process for its copies."""
        return self.directory / f"disk{process}"

    def start_all(self, *arguments: str, **options: Any) -> list["subprocess.Popen[bytes]"]:
        environments = {}
        for process in range(HOSTS):
            self.copies(process).mkdir(exist_ok=True)
            environments[process] = {"TMPDIR": str(self.copies(process))}
        return super().start_all(*arguments, environments=environments, **options)

    def run_until(self, moments: Sequence[Moment], then: Callable[[], object]) -> list[Done]:
        """Trains until the last of some moments; then both processes are killed.

        Args:
          then: called after the first moment.
        """
        processes = self.start_all()
        for number, moment in enumerate(moments):
            self.wait_for(moment, processes)
            if number == 0:
                then()
        for process in processes:
            process.kill()
        ended = self.wait_all(processes)
        if self.newest.exists():
            raise Missed("the processes were killed too late")
        return ended


def newest_steps(steps: int) -> tuple[int, int]:
    """The copy and the checkpoint of a run of so many steps, after which both are killed."""
    every = steps // 4
    return 3 * (every - 1), 2 * every


def joined_copies(steps: int) -> Iterator[Case]:
    if steps < 16:  # no copy is newer than the checkpoint
        return
    copied, saved = newest_steps(steps)
    for what, step, play in (
        ("both are killed", copied, _nothing),
        ("the disk of process 1 is lost", copied, _lose),
        ("the copy of process 1 is damaged", copied, partial(_damage, [1])),
        ("the copies of both are damaged", saved, partial(_damage, [0, 1])),
        ("the disk of process 1 is full", copied, _full),
        ("the folder of process 1 is deleted in the run", copied, _clean),
        ("the hosts come back after others went on", saved, _come_back),
    ):
        yield Case(GROUP, what, f"goes on from step {step}", partial(_play, play, step), EXACT)


def _play(play: Callable[[CopiesPlace], tuple[str, str]], step: int, place: JoinedPlace) -> Verdict:
    """Plays a case against a reference of its own, since the mesh is another.

    Args:
      play: ends with processes that were killed; returns what they said, and a regular expression
        for what must be said then or afterwards.
    """
    lab = replace(place.lab, directory=place.lab.directory / "replicas", kind=CopiesPlace)
    with _preparing:
        lab.prepare()
    here = CopiesPlace(place.directory, lab)
    here.begin("new")
    here.more_arguments = [f"checkpoint.local_every={lab.every - 1}"]
    said, must_say = play(here)
    done = here.train_all()
    said += "".join(process.stdout for process in done)
    if problem := next(filter(None, map(problem_of, done)), None):
        return Verdict(WRONG, problem)
    if any(process.status for process in done):
        return Verdict(WRONG, f"ends with {[process.status for process in done]}")
    if f"resuming from step {step} " not in done[0].stdout:
        return Verdict(WRONG, f"does not go on from step {step}; {said[-500:]}")
    if not re.search(must_say, said):
        return Verdict(WRONG, f"does not say {must_say!r}")
    lines = [line for line in said.splitlines() if re.search("local copy|own disks", line)]
    return exact(here, "; ".join(dict.fromkeys(lines)))


def _kill_both(
    place: CopiesPlace,
    of: Sequence[int] = range(HOSTS),
    first: Moment | None = None,
    then: Callable[[], object] = lambda: None,
) -> str:
    """Kills both processes when the copies of some of them are written; returns what they said."""
    moments = [Moment(f"disk{p}/moi_jax_*/*/{place.copied}.*/{p}/SHA256SUMS", 0) for p in of]
    saved = Moment(f"run/checkpoints/{place.saved}", 0)
    moments = [*([first] if first else []), *moments, saved]
    return "".join(done.stdout for done in place.run_until(moments, then))


def _nothing(place: CopiesPlace) -> tuple[str, str]:
    return _kill_both(place), "2 of 2 processes had all of their parts"


def _lose(place: CopiesPlace) -> tuple[str, str]:
    said = _kill_both(place)
    shutil.rmtree(place.copies(1))
    return said, "1 of 2 processes had all of their parts"


def _damage(processes: Sequence[int], place: CopiesPlace) -> tuple[str, str]:
    said = _kill_both(place)
    for process in processes:
        flip(find(place.copies(process), f"moi_jax_*/*/{place.copied}.*/{process}/0.npz"))
    return said, NAMED_DAMAGE


def _full(place: CopiesPlace) -> tuple[str, str]:
    """It is so from the start to the kill."""
    with place.disk(place.copies(1).name, "1m"):
        return _kill_both(place, of=[0]), "cannot write the local copy .* no space left"


def _clean(place: CopiesPlace) -> tuple[str, str]:
    """Nothing but what process 1 has written after that is left of the copies."""
    first = place.copied - (place.lab.every - 1)
    said = _kill_both(
        place,
        first=Moment(f"disk1/moi_jax_*/*/{first}.*/1/SHA256SUMS", 0),
        then=lambda: shutil.rmtree(next(place.copies(1).glob("moi_jax_*"))),
    )
    shutil.rmtree(place.copies(0))
    return said, "1 of 2 processes had all of their parts"


def _come_back(place: CopiesPlace) -> tuple[str, str]:
    """Other hosts, which are then lost with their copies, took the run on from its checkpoint."""
    _kill_both(place)
    disks = map(place.copies, range(HOSTS))
    away = [disk.rename(place.directory / f"away{disk.name}") for disk in disks]
    said = _kill_both(place)
    for process, disk in enumerate(away):
        shutil.rmtree(place.copies(process))
        disk.rename(place.copies(process))
    return said, "it belongs to another history of the run"

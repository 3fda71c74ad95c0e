"""Faults of disks and of the terminal: full from the start, full at a place in the run, read-only.

A disk is a small file system in memory, mounted for the case alone.
"""

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cases import Case
from verdicts import EXACT, Verdict, judge_run, judge_stop
from workplace import Trap, Workplace


def disks(steps: int) -> Iterator[Case]:
    every = steps // 4
    saving = f"checkpoints/{2 * every}.orbax-checkpoint-tmp"
    for fault, trap in {
        "before the run is described": Trap("os.mkdir", "run/checkpoints ", fill="run/filler"),
        "in the first steps": Trap("log", f"^step 1/{steps}  loss", fill="run/filler"),
        "when a save begins": Trap("os.mkdir", f"{saving} ", fill="run/filler"),
        "before the checksums are written": Trap("os.rename", f"{saving} ", fill="run/filler"),
        "after the last step": Trap("log", f"^step {steps}/{steps}  loss", fill="run/filler"),
        "before the report": Trap("open", r"report\.html\S* w", fill="run/filler"),
    }.items():
        yield Case("disks", "run directory full", fault, partial(_fill, "run", trap))
    for folder, name, size, fault in (
        ("run", "run directory full", "4k", "from the start"),
        ("run", "run directory full", "24m", "during the second save"),
        ("cache", "cache full", "4k", "from the start"),
        ("cache", "cache full", "160k", "in the second block"),
        ("cache", "cache full", "284k", "before a domain is complete"),
        ("tmp", "temporary directory full", "4k", "from the start"),
    ):
        yield Case("disks", name, fault, partial(_small, folder, size))
    yield Case("disks", "no inode left", "run directory", partial(_small, "run", "1g", inodes="40"))
    for folder in ("run", "cache"):
        yield Case("disks", "read-only", folder, partial(_read_only, folder))
    for number, stream in enumerate(("stdout", "stderr"), start=1):
        yield Case("terminal", stream, "full", partial(_full_terminal, stream), EXACT)
        yield Case("terminal", stream, "closed", partial(_closed, number), EXACT)
    yield Case("terminal", "stdout", "its reader leaves", _reader_leaves, EXACT)


def _fill(folder: str, trap: Trap, place: Workplace) -> Verdict:
    """The disk of a folder is filled at a place in the run."""
    with place.disk(folder, "80m"):
        place.begin("new")
        done = place.train(trap=trap)
        return judge_run(place, done, partial(place.remount, folder))


def _small(folder: str, size: str, place: Workplace, inodes: str = "0") -> Verdict:
    """The disk of a folder is too small from the start."""
    with place.disk(folder, size, nr_inodes=inodes):
        place.begin("new")
        return judge_run(place, place.train(), partial(place.remount, folder))


def _read_only(folder: str, place: Workplace) -> Verdict:
    with place.disk(folder, "1g"):
        place.begin("halfway")
        place.remount(folder, "ro")
        return judge_run(place, place.train(), partial(place.remount, folder))


def _full_terminal(stream: str, place: Workplace) -> Verdict:
    """Everything that is printed fails; the run may go on or stop, but loses nothing."""
    place.begin("new")
    with Path("/dev/full").open("wb") as full:
        done = place.train(**{stream: full})
    return judge_stop(place, done, statuses=range(2, 256))


def _closed(stream: int, place: Workplace) -> Verdict:
    place.begin("new")
    done = place.train(prefix=["sh", "-c", f'exec "$@" {stream}>&-', "sh"])
    return judge_run(place, done, lambda: None)


def _reader_leaves(place: Workplace) -> Verdict:
    """As under `| head -1`."""
    place.begin("new")
    process = place.start()
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    return judge_stop(place, place.finish(process), statuses={128 + signal.SIGPIPE})

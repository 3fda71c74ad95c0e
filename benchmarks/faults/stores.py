"""Faults of an object store: it is cut off while a checkpoint is on its way to it.

The store is the s3 server of the tests, behind a proxy that cuts connections off once so many bytes
were sent to the server.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from cases import Case
from joined_place import HOSTS, JoinedPlace
from joined_verdicts import LOST, judge_joined
from verdicts import EXACT, Verdict, judge_run, judge_stop
from workplace import ROOT, Done, Skip, Workplace

sys.path.append(str(ROOT / "tests"))
from support.object_stores import ObjectStore, missing, running

PATH = "bucket/run"
CUT_SECONDS = 20
RETRY_SECONDS = 60  # longer than the store is cut off for a while
SENT = 3_000_000  # bytes; a checkpoint has three times as many
Processes = Sequence["subprocess.Popen[bytes]"]
FOR_A_WHILE = f"cut off for {CUT_SECONDS} s while a checkpoint is sent"
FOR_GOOD = "gone for longer than retry_seconds"


def stores() -> Iterator[Case]:
    yield Case("object store", "s3", FOR_A_WHILE, _cut_off, EXACT)
    yield Case("object store", "s3", FOR_GOOD, _gone, EXACT)


def joined_stores() -> Iterator[Case]:
    group = "object store of two hosts"
    yield Case(group, "s3", FOR_A_WHILE, _cut_off_joined, EXACT)
    yield Case(group, "s3", FOR_GOOD, _gone_joined, EXACT)


@contextmanager
def _in_store(place: Workplace, *arguments: str) -> Iterator[ObjectStore]:
    """Lets the run of a case be in a store; its local copy is in the directory of the case."""
    if absent := missing("s3"):
        raise Skip(f"needs the modules {', '.join(absent)}")
    staging = place.directory / "staging"
    with running("s3") as store:
        place.more_variables = {**store.environment, "MOI_JAX_STAGING": str(staging)}
        place.more_arguments = [f"logging.run_dir=s3://{PATH}", *arguments]
        place.run = staging / "work" / "s3" / PATH
        place.begin("new")
        yield store


def _wait_until_cut(store: ObjectStore, processes: Processes) -> bool:
    """Waits until the proxy has cut the store off; False if a process ends before."""
    while not store.proxy.is_closed:
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.05)
    return True


def _cut(
    store: ObjectStore, processes: Processes, finish: Callable[[], list[Done]], for_good: bool
) -> list[Done]:
    """Cuts the store off for a while, or until the processes have ended."""
    with store.proxy.closing_after(SENT):
        sprung = _wait_until_cut(store, processes)
        if for_good:
            ended = finish()
        else:
            time.sleep(CUT_SECONDS if sprung else 0)
    if not for_good:
        ended = finish()
    return [replace(done, sprung=sprung) for done in ended]


def _cut_off(place: Workplace) -> Verdict:
    with _in_store(place, f"checkpoint.retry_seconds={RETRY_SECONDS}") as store:
        process = place.start()
        (done,) = _cut(store, [process], lambda: [place.finish(process)], for_good=False)
        return judge_run(place, done, lambda: None)


def _gone(place: Workplace) -> Verdict:
    with _in_store(place) as store:
        process = place.start()
        (done,) = _cut(store, [process], lambda: [place.finish(process)], for_good=True)
        return judge_stop(place, done, {LOST})


def _cut_off_joined(place: JoinedPlace) -> Verdict:
    with _in_store(place, f"checkpoint.retry_seconds={RETRY_SECONDS}") as store:
        processes = place.start_all()
        ended = _cut(store, processes, partial(place.wait_all, processes), for_good=False)
        return judge_joined(place, ended, [{0}] * HOSTS, "")


def _gone_joined(place: JoinedPlace) -> Verdict:
    with _in_store(place) as store:
        processes = place.start_all()
        ended = _cut(store, processes, partial(place.wait_all, processes), for_good=True)
        return judge_joined(place, ended, [{LOST}] * HOSTS, "give the same command again")

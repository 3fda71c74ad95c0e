"""Faults on two hosts: one of two processes is killed or stopped, or both meet a damaged file."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cases import Case
from damages import Damage, cut, find, flip
from joined_place import HOSTS, JOIN_SECONDS, MARGIN, JoinedPlace, Moment
from joined_verdicts import LOST, judge_joined
from network import network
from verdicts import EXACT, NAMED_STOP, WRONG, Verdict
from workplace import ROOT, TRAP, Done, Skip, Trap, Workplace

SEEDS = range(1, 11)
STOP_SEEDS = (11, 12)
# What appears in the directory of a case before the first step.
EARLY = ("config.yaml", "run/.moi_jax.lock", "cache/*/manifest.json", "run/config.yaml")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
NEWEST = "newest checkpoint on two hosts"
AROUND = "around two hosts"
BLOCK = "block/instructions.array_record"
DONE_OR_REFUSED = [{0, 2}] * HOSTS
# File of the newest checkpoint, fault, damage.
CHECKPOINTS: tuple[tuple[str, str, Damage], ...] = (
    ("parameters/ocdbt.process_0/d/* largest", "a bit flipped", flip),
    ("optimizer/ocdbt.process_1/d/* largest", "cut to half", cut),
    ("position/metadata", "a bit flipped", flip),
    ("SHA256SUMS", "cut to half", cut),
)
CACHES: tuple[tuple[str, Damage], ...] = (("deleted", Path.unlink), ("a bit flipped", flip))


def joined_cases(steps: int) -> Iterator[Case]:
    for process in range(HOSTS):
        for seed in SEEDS:
            moment = random_moment(seed, steps)
            play = partial(_kill, process, moment)
            yield Case("killed", f"seed {seed}: {moment}", f"process {process}", play, EXACT)
    for process in range(HOSTS):
        yield from _stops(process, steps)
    for file, fault, damage in CHECKPOINTS:
        play = partial(_hurt, "halfway", partial(_of_newest, file), damage, "")
        yield Case(NEWEST, file, fault, play, EXACT)
    for fault, damage in CACHES:
        play = partial(_hurt, "prepared", _of_block, damage, "cache")
        yield Case("cache on two hosts", BLOCK, fault, play)
    for folder, size in {"run": "12m", "cache": "160k"}.items():
        yield Case("disks on two hosts", folder, "full", partial(_full, folder, size), NAMED_STOP)
    play = partial(_hurt, "halfway", _of_chat, break_record, "data has changed")
    yield Case(AROUND, "chat.jsonl", "a record broken", play, NAMED_STOP)
    yield Case(AROUND, "the clock of process 0", "jumps by two hours", _clock, EXACT)
    yield Case(AROUND, "two runs", "at once in one directory", _two_runs, NAMED_STOP)
    yield Case(AROUND, "process 1", "never comes", _never_comes, EXACT)
    yield from network(steps)


def random_moment(seed: int, steps: int) -> Moment:
    """A moment in a run of so many steps, three times in ten before the first one."""
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return Moment(draw.choice(EARLY), round(draw.uniform(0, 3), 2))
    return Moment(draw.randrange(steps * 3 // 4), round(draw.uniform(0, 1), 2))


def _kill(process: int, moment: Moment, place: JoinedPlace) -> Verdict:
    processes = place.start_until(moment)
    processes[process].kill()
    statuses = [{LOST}, {LOST}]
    statuses[process] = {-signal.SIGKILL}
    ended = place.wait_all(processes, JOIN_SECONDS + MARGIN)
    not_joined = "could not join the others|not all the others came"
    cause = rf"^error: process {process} .* is lost|^error: .* {not_joined}"
    return judge_joined(place, ended, statuses, cause)


def _stops(process: int, steps: int) -> Iterator[Case]:
    """SIGTERM to one process."""
    fault = f"process {process}"
    moments = {"in the preparation": Moment("cache/blocks/*", 0)}
    for seed in STOP_SEEDS:
        moment = random_moment(seed, steps)
        moments[f"seed {seed}: {moment}"] = moment
    for name, moment in moments.items():
        yield Case("SIGTERM to one", name, fault, partial(_stop, process, moment), EXACT)
    trap = Trap("log", f"^step {steps // 2}/{steps}  loss", 0.02, [signal.SIGTERM])
    play = partial(_stop_in_evaluation, process, trap)
    yield Case("SIGTERM to one", "in an evaluation", fault, play, EXACT)


def _stop(process: int, moment: Moment, place: JoinedPlace) -> Verdict:
    processes = place.start_until(moment)
    processes[process].terminate()
    return _judge_stop(place, place.wait_all(processes, 2 * MARGIN))


def _stop_in_evaluation(process: int, trap: Trap, place: JoinedPlace) -> Verdict:
    place.begin("new")
    return _judge_stop(place, place.wait_all(place.start_all(traps={process: trap})))


def _judge_stop(place: JoinedPlace, ended: Sequence[Done]) -> Verdict:
    status = 128 + signal.SIGTERM
    return judge_joined(place, ended, [{status}, {status}], "")


def _of_newest(file: str, place: Workplace) -> Path:
    return find(place.newest, file)


def _of_block(place: Workplace) -> Path:
    return find(place.cache, "blocks/*/instructions.array_record")


def _of_chat(place: Workplace) -> Path:
    return place.samples / "chat.jsonl"


def break_record(path: Path) -> None:
    """Cuts a record of a source in the middle."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[6] = lines[6][: len(lines[6]) // 2] + "\n"
    path.write_text("".join(lines), encoding="utf-8")


def _hurt(
    state: str, target: Callable[[Workplace], Path], damage: Damage, cause: str, place: JoinedPlace
) -> Verdict:
    """Damages a file before both processes start; taken back, it is as it was."""
    place.begin(state)
    path, before = target(place), place.directory / "before"
    shutil.copyfile(path, before)
    damage(path)
    undo = partial(shutil.copyfile, before, path)
    return judge_joined(place, place.train_all(), DONE_OR_REFUSED, cause, undo)


def _full(folder: str, size: str, place: JoinedPlace) -> Verdict:
    with place.disk(folder, size, nr_inodes="0"):
        place.begin("new")
        undo = partial(place.remount, folder)
        return judge_joined(place, place.train_all(), DONE_OR_REFUSED, "no space left", undo)


def _clock(place: JoinedPlace) -> Verdict:
    """The clock of process 0, which writes the run, jumps between two steps."""
    if not FAKETIME.exists():
        raise Skip(f"needs {FAKETIME} (Debian's package libfaketime)")
    place.begin("new")
    clock = place.directory / "clock"
    clock.write_text("+0")
    environment = {
        **{"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock)},
        **{"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        "PYTHONPATH": f"{TRAP}{os.pathsep}{ROOT}",
    }
    processes = place.start_all(environments={0: environment})
    place.wait_for(Moment(place.lab.every, 0.2), processes)
    clock.write_text("+2h")
    return judge_joined(place, place.wait_all(processes), [{0}, {0}], "")


def _two_runs(place: JoinedPlace) -> Verdict:
    """Two commands begin together; one of them trains, and the other one leaves it alone."""
    place.begin("new")
    started = [place.start_all(name=name) for name in ("one", "two")]
    both = [
        place.wait_all(processes, name=name)
        for processes, name in zip(started, ("one", "two"), strict=True)
    ]
    refused, done = sorted(both, key=lambda ended: ended[0].status == 0)
    if any(process.status != 0 for process in done):
        return Verdict(WRONG, f"neither of the runs trained: {both}")
    return judge_joined(place, refused, [{2}, {2}], "is in use by another run")


def _never_comes(place: JoinedPlace) -> Verdict:
    place.begin("new")
    processes = place.start_all("cluster.join_seconds=10", alone=True)
    return judge_joined(
        place,
        place.wait_all(processes),
        [{LOST}],
        "^error: process 0 of 2 .* not all the others came",
    )

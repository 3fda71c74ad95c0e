"""Faults around the process: other users, no HOME, ASCII, changed sources, two runs at once."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from cases import Case
from damages import Damage, cut, empty, hurt
from verdicts import EXACT, NAMED_STOP, WRONG, Verdict, judge_run, judge_stop
from workplace import Skip, Trap, Workplace

SOMEONE = 54321  # a uid that no passwd entry names
# A root who may not read and write everything; someone who may read everything, since Python itself
# may lie where only root may look.
WITHOUT_POWERS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
AS_SOMEONE = [
    *("setpriv", f"--reuid={SOMEONE}", f"--regid={SOMEONE}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
WITH_SIGINT_IGNORED = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
ENCODINGS: Mapping[str, Mapping[str, str]] = {
    "LC_ALL=C": {"LC_ALL": "C"},
    "LC_ALL=C without UTF-8 mode": {
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    },
    "PYTHONIOENCODING=ascii": {"PYTHONIOENCODING": "ascii"},
}
NO_HOME: Mapping[str, str | None] = {"HOME": None}
CACHE_AT_HOME = "data.cache_dir=~/cache"


def surroundings(steps: int) -> Iterator[Case]:
    yield from _permissions()
    yield from _homes()
    for fault, variables in ENCODINGS.items():
        yield Case("terminal", "encoding", fault, partial(_environment, variables), EXACT)
    yield from _ignored_sigint(steps)
    for file, fault, damage, demands in SOURCES:
        play = partial(hurt, "halfway", partial(_of_samples, file), damage)
        yield Case("sources", file, fault, play, demands)
    for arguments in ([], ["--fresh"]):
        fault = " ".join(["a second command", *arguments])
        play = partial(_second_command, arguments)
        yield Case("two commands", "while a run trains", fault, play, NAMED_STOP)
    yield Case("two commands", "after a kill", "--fresh", _fresh, EXACT)


def _permissions() -> Iterator[Case]:
    for name, state in (("run", "halfway"), ("cache", "prepared")):
        for fault, mode in {"someone's, readable": 0o755, "someone's, not readable": 0o700}.items():
            play = partial(_of_someone, name, state, mode)
            yield Case("permissions", f"{name} directory", fault, play)
        play = partial(_read_only, name, state, ["-R"])
        yield Case("permissions", f"{name} directory", "read-only", play)
    play = partial(_read_only, ".", "prepared", [])
    yield Case("permissions", "the folder of a new run", "read-only", play, NAMED_STOP)


def _of_someone(name: str, state: str, mode: int, place: Workplace) -> Verdict:
    place.begin(state)
    folder = place.directory / name
    _give(folder, SOMEONE)
    folder.chmod(mode)

    def undo() -> None:
        _give(folder, os.geteuid())
        folder.chmod(0o755)

    return judge_run(place, place.train(prefix=_without_powers()), undo)


def _read_only(name: str, state: str, options: Sequence[str], place: Workplace) -> Verdict:
    place.begin(state)
    folder = place.directory / name
    subprocess.run(["chmod", *options, "a-w", folder], check=True)
    try:
        done = place.train(prefix=_without_powers())
    finally:
        subprocess.run(["chmod", *options, "u+w", folder], check=True)
    return judge_run(place, done, lambda: None)


def _give(folder: Path, owner: int) -> None:
    try:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner, -1)
    except OSError:
        raise Skip("needs root") from None


def _without_powers() -> list[str]:
    return WITHOUT_POWERS if os.geteuid() == 0 else []


def _homes() -> Iterator[Case]:
    for place, fault, variables, arguments, prefix, demands in (
        ("unset", "the cache elsewhere", NO_HOME, [], [], EXACT),
        ("unset", "uid unknown", NO_HOME, [], AS_SOMEONE, EXACT),
        ("unset", "uid unknown, the cache in it", NO_HOME, [CACHE_AT_HOME], AS_SOMEONE, NAMED_STOP),
        ("not writable", "the cache in it", {"HOME": "/proc"}, [CACHE_AT_HOME], [], NAMED_STOP),
    ):
        play = partial(_environment, variables, arguments=arguments, prefix=prefix)
        yield Case("HOME", place, fault, play, demands)


def _environment(
    variables: Mapping[str, str | None],
    place: Workplace,
    arguments: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> Verdict:
    place.begin("new")
    if prefix and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        raise Skip("needs root")
    if prefix == AS_SOMEONE:
        _give(place.directory, SOMEONE)
    done = place.train(*arguments, environment=variables, prefix=prefix)
    return judge_run(place, done, lambda: None)


def _ignored_sigint(steps: int) -> Iterator[Case]:
    """As in a script's `command &`."""
    play = partial(_environment, {}, prefix=WITH_SIGINT_IGNORED)
    yield Case("SIGINT ignored by the parent", "whole run", "unhurt", play, EXACT)
    for sent in (signal.SIGINT, signal.SIGTERM):
        trap = Trap("log", f"^step {steps // 2 + steps // 8}/{steps}  loss", signals=[sent])
        play = partial(_stop_with_sigint_ignored, trap)
        yield Case("SIGINT ignored by the parent", "in the middle", sent.name, play, EXACT)


def _stop_with_sigint_ignored(trap: Trap, place: Workplace) -> Verdict:
    place.begin("new")
    done = place.train(trap=trap, prefix=WITH_SIGINT_IGNORED)
    return judge_stop(place, done, {128 + sent for sent in trap.signals})


def change(path: Path) -> None:
    """Changes a letter of a row that is trained on."""
    text = path.read_text(encoding="utf-8")
    middle = text.index("e", text.index('"content"') + 12)
    path.write_text(text[:middle] + "a" + text[middle + 1 :], encoding="utf-8")


def swap_tokens(path: Path) -> None:
    """Gives two letters each other's ids."""
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(values), encoding="utf-8")


def add_rows(path: Path) -> None:
    """Adds rows behind those of max_rows."""
    path.write_bytes(path.read_bytes() * 2)


# File, fault, damage, demanded verdict.
SOURCES: tuple[tuple[str, str, Damage, str | None], ...] = (
    ("chat.jsonl", "a letter changed", change, NAMED_STOP),
    ("chat.jsonl", "rows added", add_rows, None),
    ("chat.jsonl", "cut to half", cut, None),
    ("chat.jsonl", "emptied", empty, NAMED_STOP),
    ("chat.jsonl", "deleted", Path.unlink, NAMED_STOP),
    ("tokenizer/tokenizer.json", "two tokens swapped", swap_tokens, NAMED_STOP),
    ("tokenizer/tokenizer.json", "cut to half", cut, NAMED_STOP),
    ("tokenizer/tokenizer.json", "emptied", empty, NAMED_STOP),
    ("tokenizer/tokenizer.json", "deleted", Path.unlink, NAMED_STOP),
)


def _of_samples(file: str, place: Workplace) -> Path:
    return place.samples / file


def _second_command(arguments: Sequence[str], place: Workplace) -> Verdict:
    place.begin("new")
    first = place.start()
    deadline = time.monotonic() + place.lab.timeout
    while not (place.run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second, done = place.finish(place.start(*arguments)), place.finish(first)
    if done.status != 0:
        return Verdict(WRONG, f"the first run ended with status {done.status}")
    return judge_run(place, second, lambda: None)


def _fresh(place: Workplace) -> Verdict:
    """A run begins anew; the old one is moved aside."""
    place.begin("halfway")
    newest = place.newest.relative_to(place.run)
    shutil.copytree(place.newest, place.directory / "before")
    verdict = judge_run(place, place.train("--fresh"), lambda: None)
    aside = [folder / newest for folder in place.directory.glob("run.*")]
    compare = ["diff", "-r", str(place.directory / "before"), *map(str, aside)]
    if len(aside) != 1 or subprocess.run(compare, capture_output=True, check=False).returncode:
        return Verdict(WRONG, "the old run is not whole beside the new one")
    return verdict

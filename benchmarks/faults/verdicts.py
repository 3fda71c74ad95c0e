"""Verdicts: whether a fault was survived exactly, was a stop with a name, or went wrong.

exact       the same command, given again, ends with bit-identical parameters, optimizer state,
            position, metrics and answers
named stop  status 2 and one line that begins with "error:"; no checkpoint changed; once the fault
            is taken back, the same command ends exact
wrong       everything else: other values, a traceback, another exit status, a command that hangs
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from workplace import Done, Workplace

EXACT, NAMED_STOP, WRONG, SKIPPED = "exact", "named stop", "wrong", "skipped"


@dataclass(frozen=True)
class Verdict:
    """A verdict, and in a line what was seen."""

    kind: str
    seen: str = ""


def judge_run(place: Workplace, done: Done, undo: Callable[[], object]) -> Verdict:
    """Judges a command that ran under a fault to its end; `undo` takes the fault back."""
    if problem := problem_of(done):
        return Verdict(WRONG, problem)
    if done.status == 0:
        return exact(place, _told(done))
    if done.status != 2:
        return Verdict(WRONG, f"status {done.status}: {last_line(done)}")
    # Libraries warn there, too, as matplotlib does where HOME cannot be written.
    lines = [x for x in done.stderr.splitlines() if not x.lower().startswith("warning:")]
    if len(lines) != 1 or not lines[0].startswith("error:"):
        return Verdict(WRONG, f"status 2 with {len(lines)} lines: {last_line(done)}")
    if done.lost:
        return Verdict(WRONG, f"a stop that lost {', '.join(done.lost)}: {lines[0]}")
    undo()
    verdict = judge_again(place, lines[0])
    return verdict if verdict.kind == WRONG else Verdict(NAMED_STOP, verdict.seen)


def judge_stop(place: Workplace, done: Done, statuses: Collection[int]) -> Verdict:
    """Judges a command that may have ended early, with one of `statuses`, and gives it again."""
    if problem := problem_of(done):
        return Verdict(WRONG, problem)
    if done.status not in {0, *statuses}:
        return Verdict(WRONG, f"status {done.status}: {last_line(done)}")
    if len(done.stderr.splitlines()) > 1:
        return Verdict(WRONG, f"{len(done.stderr.splitlines())} lines: {last_line(done)}")
    return judge_again(place, f"status {done.status}: {last_line(done)}")


def judge_again(place: Workplace, seen: str = "") -> Verdict:
    """Gives the command without any fault; it must end exact."""
    done = place.train()
    if done.status != 0:
        return Verdict(WRONG, f"then, unhurt, status {done.status}: {last_line(done)}")
    return exact(place, seen)


def exact(place: Workplace, seen: str) -> Verdict:
    """Compares the end of a run with that of the reference."""
    ours, wanted = place.results(), place.lab.reference().results()
    other = [name for name in wanted if ours[name] != wanted[name]]
    if other:
        return Verdict(WRONG, f"ends with other values: {', '.join(other)}; {seen}")
    return Verdict(EXACT, seen)


def problem_of(done: Done) -> str | None:
    """What is wrong whatever the fault."""
    if not done.sprung:
        return "the fault never happened"
    if done.status is None:
        return "does not end"
    if "Traceback" in done.stdout + done.stderr:
        lines = len(done.stderr.splitlines())
        return f"status {done.status}, a traceback, {lines} lines: {last_line(done)}"
    return None


def _told(done: Done) -> str:
    """The warnings of a run that went on."""
    lines = (done.stdout + done.stderr).splitlines()
    return " ".join(line for line in lines if line.startswith("warning:"))


def last_line(done: Done) -> str:
    """The last line on standard error or, if there is none, on standard output."""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:300] if lines else "says nothing"

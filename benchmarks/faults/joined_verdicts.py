"""Verdicts on two hosts: both processes end in time and name the cause, then the run goes on."""

import re
from collections.abc import Callable, Collection, Sequence

from joined_place import JoinedPlace
from verdicts import NAMED_STOP, WRONG, Verdict, exact, judge_again, last_line, problem_of
from workplace import Done

LOST = 75


def judge_joined(
    place: JoinedPlace,
    ended: Sequence[Done],
    statuses: Sequence[Collection[int]],
    causes: str | Sequence[str],
    undo: Callable[[], object] = lambda: None,
) -> Verdict:
    """Judges processes that ran under a fault; unless they are done, gives the command again.

    Args:
      statuses: those with which each process may end.
      causes: a regular expression for the last line of each that stopped by itself.
      undo: takes the fault back.
    """
    seen = "; ".join(map(_seen, ended))
    if isinstance(causes, str):
        causes = [causes] * len(ended)
    if problem := next(filter(None, map(_problem, ended, statuses, causes)), None):
        return Verdict(WRONG, f"{problem}; {seen}")
    if lost := ended[0].lost:
        return Verdict(WRONG, f"lost {', '.join(lost)}; {seen}")
    if all(done.status == 0 for done in ended):
        return exact(place, seen)
    undo()
    verdict = judge_again(place, seen)
    stopped = any(done.status == 2 for done in ended) and verdict.kind != WRONG
    return Verdict(NAMED_STOP, verdict.seen) if stopped else verdict


def _problem(done: Done, statuses: Collection[int], cause: str) -> str | None:
    if problem := problem_of(done):
        return problem
    if done.status not in statuses:
        return f"status {done.status}"
    if (done.status or 0) > 0 and not re.search(cause, last_line(done)):
        return f"a stop that does not say {cause!r}"
    return None


def _seen(done: Done) -> str:
    said = f", {last_line(done)}" if (done.status or 0) > 0 else ""
    return f"status {done.status} after {done.seconds:.1f} s{said}"

"""Whether two mathematical answers are equal, by math-verify in a process that can be killed.

math-verify stops itself by signals, which no thread can have, and which wait for a long product to
be done. Here its clock is off and the process is killed instead. This file, run as a program, is
that process: a JSON line [gold, answer] in, a line true or false out.
"""

import json
import logging
import os
import resource
import select
import subprocess
import sys
from typing import Any

SECONDS = 10.0  # of wall time for one comparison; those of MATH-500 take up to 0.1
MEMORY = 4 * 2**30  # bytes of address space: a tower of powers is written down in no time


class Equivalence:
    """Compares answers one after another; leaving the context ends the process."""

    _worker: "subprocess.Popen[bytes] | None" = None

    def __enter__(self) -> "Equivalence":
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def equal(self, gold: str, answer: str) -> bool | None:
        """None where the comparison came to no end: it took too long, or broke its process."""
        worker = self._worker = self._worker or _start()
        assert worker.stdin
        assert worker.stdout
        try:
            worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            ready, _, _ = select.select([worker.stdout], [], [], SECONDS)
            line = worker.stdout.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        if not line:
            self._end()
            return None
        return bool(json.loads(line))

    def _end(self) -> None:
        if self._worker:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def _start() -> "subprocess.Popen[bytes]":
    # -P: this file's folder is no place to import from, it has a statistics.py of its own.
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert worker.stdout
    if not worker.stdout.readline():
        worker.communicate()
        raise RuntimeError("the process that compares answers did not start; see the error above")
    return worker


def work() -> None:
    """Answers the lines of standard input until it is closed."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    # Whatever else is printed shall not be taken for an answer.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        equal = verify(gold, answer, timeout_seconds=None)
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    work()

"""Compares two mathematical answers with math-verify, in a process that can be killed.

math-verify limits its time by signals. These work only in the main thread, and they wait until a
long multiplication ends. So its time limit is off here, and the process is killed instead. This
file is that process when it runs as a program: it reads JSON lines [gold, answer] and writes lines
true or false.
"""

import json
import logging
import os
import resource
import select
import subprocess
import sys
from typing import Any

SECONDS = 10.0  # wall time for one comparison; those of MATH-500 take up to 0.1
MEMORY = 4 * 2**30  # bytes of address space: a short text such as 9^9^9^9 could need far more


class Equivalence:
    """Compares answers one after another. Leaving the context ends the process."""

    _worker: "subprocess.Popen[bytes] | None" = None

    def __enter__(self) -> "Equivalence":
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether the answers are equal; None after a timeout or a crash of the process."""
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
    # -P: nothing is imported from this file's folder, so its modules cannot shadow others.
    # In a session of its own, Ctrl-C does not reach it. It ends when its input is closed.
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
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
    # Other output must not be read as an answer, so it goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        equal = verify(gold, answer, timeout_seconds=None)
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    work()

"""The runner: tests a program that runs in another process, and reports the verdict.

The runner reads the tests, the expected values and the nonce after it has forked the program's
process, and never sends them there. Each name that the tests use from the program is a `Remote`: a
call sends the arguments, and the result comes back as plain data and is compared here. So the
program can pass a test only with a function that returns the right result.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from moi_jax.evaluation.sandbox.inside import confine, namespaces, program, rpc
from moi_jax.evaluation.sandbox.inside.link import Link, ProgramError


def main(backend: str) -> None:
    """Reads set-up, program and tests from standard input; writes "ready" and the verdict."""
    setup = json.loads(rpc.receive(0))
    if backend == "namespaces":
        namespaces.enter(setup["read_only"], setup["limits"])
    elif backend == "bubblewrap":
        namespaces.mount_directory(namespaces.DIRECTORY, setup["limits"])
        os.chdir(namespaces.DIRECTORY)
    confine.confine(setup["limits"], strict=backend != "weak")
    if backend == "weak":
        confine.adopt_orphans()
    sys.path += setup["packages"]
    os.write(1, b"ready\n")
    _end_with(run(json.loads(rpc.receive(0)), setup["limits"]["wall"]))


def _end_with(verdict: dict[str, str]) -> NoReturn:
    """Reports the verdict. Ends the program, what it has started, and this process."""
    # The program can send these signals. Their handlers would report a second verdict, or none.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGINT])
    os.write(1, json.dumps(verdict).encode())
    confine.end_children()
    os._exit(0)


def run(asked: dict[str, Any], wall: float) -> dict[str, str]:
    """Starts the program, then reads the tests and runs them in order.

    Args:
      wall: seconds from here on; when they are over, this process reports it and ends.

    Returns:
      {"passed": nonce} or {"failure": kind, "error": last line of the error}.
    """
    requests_out, requests_in = os.pipe()
    replies_out, replies_in = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            program.leave_standard_streams()
            os.close(requests_in)
            os.close(replies_out)
            program.serve(requests_out, replies_in, **asked)
        finally:
            os._exit(1)
    _end_after(wall)
    os.close(requests_out)
    os.close(replies_in)
    tests = json.loads(rpc.receive(0))
    try:
        _test(Link(requests_in, replies_out), asked["names"], tests["trusted"], tests["tests"])
    except rpc.Closed:
        return _end_of(child)
    except ProgramError as error:
        return {"failure": error.kind, "error": error.described}
    except AssertionError as error:
        return {"failure": "wrong", "error": _with_line(error, tests["tests"])}
    except Exception as error:
        return {"failure": "error", "error": _with_line(error, tests["tests"])}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"passed": tests["nonce"]}


def _end_after(wall: float) -> None:
    """Reports a timeout and ends this process after so many seconds.

    No exception is raised for this: the tests could catch it.
    """
    verdict = {"failure": "timeout", "error": f"not done after {wall:g} seconds"}
    signal.signal(signal.SIGALRM, lambda *_: _end_with(verdict))
    signal.setitimer(signal.ITIMER_REAL, wall)


def _test(link: Link, names: Sequence[str], trusted: str, tests: Sequence[str]) -> None:
    """Runs the tests in a namespace with the definitions of the program and the trusted code.

    The program can define only the names that are expected from it, and not, for example, that of
    a built-in function. A name that the trusted code defines replaces that of the program.
    """
    given = link.answer()
    namespace = link.namespace
    namespace.update({name: given[name] for name in names if name in given})
    exec(compile(trusted, "<trusted>", "exec"), namespace)
    for number, source in enumerate(tests):
        exec(compile(source, f"<test {number}>", "exec"), namespace)


def _with_line(error: Exception, tests: Sequence[str]) -> str:
    """The error with the line of the tests that raised it."""
    text, trace = program.describe(error), error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith("<test "):
            line = tests[int(file[6:-1])].splitlines()[trace.tb_lineno - 1].strip()
            text = f"{program.describe(error)} in: {line}"[: program.LONGEST_ERROR]
        trace = trace.tb_next
    return text


def _end_of(child: int) -> dict[str, str]:
    """The verdict of a program that ended before its tests."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        error = f"the program ended with status {os.WEXITSTATUS(status)} before its tests"
        return {"failure": "killed", "error": error}
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return {"failure": "timeout", "error": "out of processor time"}
    return {"failure": "killed", "error": f"the program was killed: {signal.strsignal(number)}"}

"""Tests every limit of a sandbox with a program that tries to exceed it."""

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moi_jax.evaluation.sandbox.backends import Limits, environment, read_only
from moi_jax.evaluation.sandbox.execution import Program, Verdict
from moi_jax.evaluation.sandbox.inside.namespaces import FILES
from moi_jax.evaluation.sandbox.packages import NONE, Packages

# Seconds that a probe may take: on a busy machine, one second of processor time can take long.
PATIENCE = 120.0

# Each function returns True if its limit held, and removes what it created.
_CODE = """
import errno, os, signal, socket, time

def held(limit, *args):
    try:
        return limit(*args) is True
    except BaseException:
        return False

def fails(kind, work):
    try:
        work()
    except OSError as error:
        return error.errno == kind

def network(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2)
    except OSError:
        return True

def reading(paths):
    return not any(os.path.lexists(path) for path in paths)

def environment(names):
    return os.environ.keys() <= set(names)

def others(pid):
    return fails(errno.ESRCH, lambda: os.kill(pid, 0))

def writing(directories):
    for directory in directories:
        path = os.path.join(directory, "overstepped")
        try:
            open(path, "x").close()
        except OSError:
            continue
        os.unlink(path)
        return False
    return True

def memory(size):
    try:
        bytearray(size)
    except MemoryError:
        return fails(errno.EPERM, lambda: os.memfd_create("overstepped"))

def processes(count):
    children = []
    def start():
        for _ in range(count):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
    try:
        return fails(errno.EAGAIN, start)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

def write(path, size):
    with open(path, "wb", buffering=0) as file:
        for _ in range(-(-size // 2**20)):
            file.write(bytes(2**20))

def file_size(size):
    try:
        return fails(errno.EFBIG, lambda: write("large", size + 1))
    finally:
        os.unlink("large")

def disk(size, count):
    names = [f"file{n}" for n in range(count)]
    try:
        return fails(errno.ENOSPC, lambda: [write(name, size) for name in names])
    finally:
        for name in names:
            if os.path.exists(name):
                os.unlink(name)

def files(count):
    return fails(errno.ENOSPC, lambda: [os.mkdir(str(n)) for n in range(count)])

def open_files(count):
    return fails(errno.EMFILE, lambda: [os.dup(0) for _ in range(count)])

def cpu():
    while True:
        pass
"""


def unenforced(
    execute: Callable[[Limits, Program], Verdict], limits: Limits, packages: Packages = NONE
) -> str | None:
    """The name of the first limit that does not hold; None where all of them hold.

    Args:
      execute: runs a program within limits.
    """
    limits = replace(limits, wall=max(limits.wall, PATIENCE))
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        tempfile.NamedTemporaryFile() as secret,
    ):
        home = str(Path.home())
        hidden = [secret.name, "/etc/passwd", "/proc/self", "/dev/shm", "/sys/kernel"]
        hidden += _at_home(packages)
        pieces = limits.disk // limits.file_size + 1
        attempts: dict[str, tuple[Any, ...]] = {
            "network access": ("network", server.getsockname()[1]),
            "reading the user's files": ("reading", hidden),
            "the user's environment": ("environment", [*environment(""), "LC_CTYPE", "PWD"]),
            "other processes": ("others", os.getpid()),
            "writing outside": ("writing", ["/", "/dev", "/usr/lib", home, tempfile.gettempdir()]),
            "memory": ("memory", limits.memory),
            "the number of processes": ("processes", limits.processes),
            "the size of a file": ("file_size", limits.file_size),
            "disk space": ("disk", limits.file_size, pieces),
            "open files": ("open_files", limits.open_files),
            "the number of files": ("files", FILES),
        }
        tests = tuple(
            f"assert held({name}, *{args!r}), {what!r}" for what, (name, *args) in attempts.items()
        )
        names = ("held", *(name for name, *_ in attempts.values()))
        verdict = execute(limits, Program(_CODE, names, tests))
    if not verdict.passed:
        # The message of the assertion is the name of the limit.
        return verdict.error.removeprefix("AssertionError: ").split(" in: ")[0]
    verdict = execute(replace(limits, cpu=1), Program(_CODE, ("cpu",), ("cpu()",)))
    if verdict != Verdict("timeout", "out of processor time"):
        return f"processor time ({verdict.error})"
    return None


def _at_home(packages: Packages) -> list[str]:
    """The entries of the user's home directory, except those that lead to Python or packages."""
    try:
        entries = [str(path) for path in Path.home().iterdir()]
    except OSError:
        return []
    return [e for e in entries if not any(path.startswith(e) for path in read_only(packages))]

"""Executes one program with its tests: starts a runner in a backend and reads its verdict."""

import json
import os
import secrets
import signal
import struct
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass

from moi_jax.common.errors import UserError
from moi_jax.evaluation.sandbox import backends
from moi_jax.evaluation.sandbox.backends import Backend, Limits
from moi_jax.evaluation.sandbox.inside.namespaces import DIRECTORY, NOBODY
from moi_jax.evaluation.sandbox.packages import NONE, Packages
from moi_jax.evaluation.sandbox.scratch import scratch_directory

# Seconds for the sandbox to start, in which a program cannot run; more than a busy machine needs.
START = 60.0


@dataclass(frozen=True)
class Program:
    """Code and its tests.

    Attributes:
      code: untrusted code; it runs in a process of its own.
      names: the names that the tests use from the code.
      tests: statements that the runner executes in order. They pass if none raises an exception.
      trusted: code that runs before `code`, and again before the tests in their own process. The
        tests use its definitions and not those of `code` with the same name.
    """

    code: str
    names: tuple[str, ...]
    tests: tuple[str, ...]
    trusted: str = ""


@dataclass(frozen=True)
class Verdict:
    """The result of a program.

    Attributes:
      failure: None for a pass, else "no code", "syntax error", "wrong" (an assertion of a test
        failed), "error" (an exception), "timeout" or "killed" (the process ended before the tests).
      error: the last line of the error.
    """

    failure: str | None
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.failure is None


def execute(
    backend: Backend, limits: Limits, program: Program, packages: Packages = NONE
) -> Verdict:
    """Runs a program and its tests. When it returns, all their processes are killed.

    Args:
      packages: what the program and its tests can import beside Python's own modules.

    Raises:
      UserError: the sandbox itself does not start.
    """
    if not program.code.strip():
        return Verdict("no code")
    nonce = secrets.token_hex(16)
    setup = {
        "limits": asdict(limits),
        "read_only": backends.read_only(packages),
        "packages": packages.directories,
    }
    asked = {"trusted": program.trusted, "code": program.code, "names": program.names}
    tests = {"trusted": program.trusted, "tests": program.tests, "nonce": nonce}
    frames = b"".join(_frame(part) for part in (setup, asked, tests))
    with scratch_directory() as scratch:
        process = _start(backend, packages, scratch)
        try:
            out, err = process.communicate(frames, timeout=START + limits.wall)
        except subprocess.TimeoutExpired:
            return Verdict("timeout", f"not done after {limits.wall:g} seconds")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    ready, _, line = out.partition(b"\n")
    reason = err.decode(errors="replace").strip().split("\n")[-1]
    if ready != b"ready":
        raise _no_start(backend, reason or "killed")
    if not line:
        return Verdict("killed", f"the runner of the tests was killed: {reason}".rstrip(": "))
    try:
        return _verdict(json.loads(line), nonce)
    except ValueError:
        return Verdict("killed", "the runner of the tests was killed while it wrote its verdict")


def _start(backend: Backend, packages: Packages, scratch: str) -> subprocess.Popen[bytes]:
    as_nobody = backend == "bubblewrap" and os.geteuid() == 0
    try:
        return subprocess.Popen(
            backends.command(backend, packages),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=backends.environment(scratch if backend == "weak" else DIRECTORY),
            cwd=scratch if backend == "weak" else "/",
            start_new_session=True,
            # The limit on processes does not apply to root.
            user=NOBODY if as_nobody else None,
            group=NOBODY if as_nobody else None,
            extra_groups=() if as_nobody else None,
        )
    except OSError as error:
        raise _no_start(backend, str(error)) from None


def _no_start(backend: Backend, reason: str) -> UserError:
    return UserError(f"the sandbox ({backend}) does not start here: {reason}")


def _frame(part: object) -> bytes:
    data = json.dumps(part).encode()
    return struct.pack(">I", len(data)) + data


def _verdict(said: dict[str, str], nonce: str) -> Verdict:
    if secrets.compare_digest(said.get("passed", ""), nonce):
        return Verdict(None)
    return Verdict(said["failure"], said["error"])

"""The sandbox: finds a backend that enforces every limit, and runs programs in parallel."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Literal

from moi_jax.common.errors import UserError
from moi_jax.evaluation.sandbox.backends import Backend, Limits, candidates
from moi_jax.evaluation.sandbox.execution import Program, Verdict, execute
from moi_jax.evaluation.sandbox.packages import NONE, Packages
from moi_jax.evaluation.sandbox.probe import unenforced

WEAK = (
    "the weak sandbox: generated code runs with this user's rights. It can use the network, read "
    "and change this user's files, see and stop other processes, leave processes behind, and even "
    "forge its verdict. Only time, memory per process and file size are limited"
)


class Sandbox:
    """Runs programs. `backend` is the name of the isolation that is used."""

    packages: Packages = NONE

    def __init__(
        self,
        mode: Literal["strict", "weak"] = "strict",
        limits: Limits | None = None,
        workers: int | None = None,
        packages: Packages = NONE,
    ):
        """The strict sandbox tests every limit first, once per process.

        Args:
          packages: what programs can import beside Python's own modules.
          workers: number of programs at the same time; None is one for each core.

        Raises:
          UserError: a limit of the strict sandbox does not hold here. The message names it.
        """
        self.limits = limits or Limits()
        self.packages = packages
        self.backend: Backend = "weak" if mode == "weak" else strict_backend(self.limits, packages)
        self.workers = workers or os.cpu_count() or 1

    def run(self, program: Program) -> Verdict:
        """Runs one program; raises UserError where the sandbox itself does not start."""
        return execute(self.backend, self.limits, program, self.packages)

    def run_all(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """Yields the verdicts in order. A program is taken only when it is about to run."""
        running: deque[Future[Verdict]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for program in programs:
                    running.append(pool.submit(self.run, program))
                    if len(running) == 2 * self.workers:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


@lru_cache
def strict_backend(limits: Limits, packages: Packages = NONE) -> Backend:
    """The first backend that enforces every limit.

    Raises:
      UserError: there is none. The message names the limit that fails in each backend.
    """
    failures = []
    for backend in candidates():
        try:
            failure = unenforced(partial(execute, backend, packages=packages), limits, packages)
        except UserError as error:
            failure = str(error)
        if failure is None:
            return backend
        failures.append(f"{backend}: {failure}")
    reason = "; ".join(failures) or "the strict sandbox needs Linux"
    raise UserError(
        f"generated code cannot be isolated on this machine, so it is not run ({reason}); allow "
        f"user namespaces, install bubblewrap, or accept fewer limits with --sandbox weak"
    )

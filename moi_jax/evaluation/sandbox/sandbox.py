"""The sandbox: the backend that holds every limit on this machine, and programs side by side."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Literal

from moi_jax.common.errors import UserError
from moi_jax.evaluation.sandbox.backends import Backend, Limits, candidates
from moi_jax.evaluation.sandbox.execution import Program, Verdict, execute
from moi_jax.evaluation.sandbox.probe import unenforced

WEAK = (
    "the weak sandbox: generated code runs with this user's rights. It can reach the network, "
    "read and change this user's files, see and stop other processes, and leave processes behind; "
    "one that sets out to can even forge its verdict. Limited are only time, the memory of each "
    "process and the size of each file"
)


class Sandbox:
    """Where programs run. `backend` says what keeps them in."""

    def __init__(
        self,
        mode: Literal["strict", "weak"] = "strict",
        limits: Limits | None = None,
        workers: int | None = None,
    ):
        """Tries every limit of the strict sandbox, once in this process.

        Args:
          workers: programs at a time; None is one for each core.

        Raises:
          UserError: a limit of the strict sandbox does not hold here; it is named.
        """
        self.limits = limits or Limits()
        self.backend: Backend = "weak" if mode == "weak" else strict_backend(self.limits)
        self.workers = workers or os.cpu_count() or 1

    def run(self, program: Program) -> Verdict:
        """Raises UserError where the sandbox itself does not start."""
        return execute(self.backend, self.limits, program)

    def run_all(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """The verdicts in order. Programs are taken only as they are about to run."""
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
def strict_backend(limits: Limits) -> Backend:
    """The first backend that holds every limit.

    Raises:
      UserError: none does; says which limit fails where.
    """
    failures = []
    for backend in candidates():
        try:
            failure = unenforced(partial(execute, backend), limits)
        except UserError as error:
            failure = str(error)
        if failure is None:
            return backend
        failures.append(f"{backend}: {failure}")
    reason = "; ".join(failures) or "the strict sandbox needs Linux"
    raise UserError(
        f"generated code is not run here, it could not be contained ({reason}); allow user "
        f"namespaces or install bubblewrap, or accept less with --sandbox weak"
    )

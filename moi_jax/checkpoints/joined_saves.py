"""orbax's manager of checkpoints, where a save succeeds on all hosts or is given up by all."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from moi_jax.parallel import hosts
from moi_jax.parallel.shared_work import FailedElsewhere, SharedWork

# Where the background of a save waits for the other processes; its other barriers all reach.
MAY_FAIL = ("async_write_complete", "async_commit_complete")


class Manager(ocp.CheckpointManager):
    """A manager that tells the other processes when this one cannot write its files.

    orbax itself lets them wait for this one until the time limit of the save.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        timeout: int,
        describe: Callable[[BaseException], dict[str, Any] | None],
        temporary_path_class: type[atomicity.AtomicRenameTemporaryPath],
        **options: Any,
    ):
        """
        Args:
          timeout: of a save, in seconds.
          describe: what the others shall know of an error; None for a fault of the program, which
            ends them all.
          options: those of orbax.
        """
        self._describe = describe
        self._fault: BaseException | None = None
        self._work: SharedWork | None = None
        self._done: SharedWork | None = None
        wait = self._wait_for_all if hosts.joined() else None
        super().__init__(
            directory,
            options=ocp.CheckpointManagerOptions(
                async_options=ocp.AsyncOptions(timeout_secs=timeout, barrier_sync_fn=wait),
                temporary_path_class=temporary_path_class,
                **options,
            ),
        )

    def begin(self) -> None:
        """Call it before `save`, when the save before has ended."""
        if joined := hosts.joined():
            if self._done:  # a process that begins this save has long forgotten that one
                self._done.forget()
            self._done, self._work = self._work, SharedWork(joined)

    def has_failed(self) -> bool:
        """Whether the last save is known to have failed; the same in all processes at a call."""
        self.raise_fault()
        return self._work is not None and self._work.failed()

    def failure(self) -> dict[str, Any] | None:
        """What the first process that failed has told of it; the number of that "process"."""
        return self._work.failure() if self._work else None

    def raise_fault(self) -> None:
        """Raises the error of the last save if it is a fault of the program in this process."""
        if self._fault:
            raise self._fault

    def end(self) -> None:
        """The last save has ended well."""
        if self._work:
            self._work.succeed()

    def _wait_for_all(self, *, key: str, timeout_ms: int) -> None:
        assert self._work
        error = sys.exception()
        # The thread that ends a save comes here at its end, also while an error ends it.
        if error and threading.current_thread() is not threading.main_thread():
            self._tell(error)
        gives_up = any(name in key for name in MAY_FAIL)
        self._work.wait_for_all(key, timeout_ms / 1000, gives_up)

    def _tell(self, error: BaseException) -> None:
        if isinstance(error, FailedElsewhere):
            return
        assert self._work
        if described := self._describe(error):
            self._work.fail(described)
            if hosts.is_main():
                _release_writers()
        else:
            self._fault = error


def _release_writers() -> None:
    """Lets the processes go on that wait until process 0 has made the folders; it has failed."""
    # What they wait for has no public name. Another orbax may not have it: it is only needed here.
    from orbax.checkpoint._src.futures import future, synchronization

    signals = synchronization.HandlerAwaitableSignal
    future.set_signals(
        [signals.STEP_DIRECTORY_CREATION, signals.ITEM_DIRECTORY_CREATION],
        operation_id=synchronization.OperationIdGenerator.get_current_operation_id(),
    )

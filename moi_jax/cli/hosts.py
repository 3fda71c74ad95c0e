"""How a command joins other processes, and how it ends together with them."""

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moi_jax.config import Cluster
    from moi_jax.parallel.watch import Watch


def join_hosts(args: argparse.Namespace, timeouts: "Cluster") -> None:
    """Joins the processes of which the options or the cluster tell, see `joining.join`."""
    from moi_jax.parallel.joining import join

    join(args.coordinator, args.num_processes, args.process_id, timeouts)


@contextmanager
def mistakes_told_to_hosts(args: argparse.Namespace) -> Iterator[None]:
    """Lets a mistake that is found before the processes join end all of them, not this one alone.

    The others would wait for it in vain.
    """
    from moi_jax.common.errors import UserError
    from moi_jax.config import Cluster

    try:
        yield
    except UserError:
        join_hosts(args, Cluster())
        raise


def check_same_command(args: argparse.Namespace) -> None:
    """Checks that all processes run the same code with the same arguments.

    Raises:
      UserError: they do not; the message names the argument.
    """
    from moi_jax.parallel.hosts import check_same_code

    own = ("process_id", "coordinator")  # each may reach process 0 by another address
    check_same_code({key: str(value) for key, value in vars(args).items() if key not in own})


def leave_hosts() -> None:
    """Ends the work of a process that is done, when the others are done too."""
    if _watch():
        from moi_jax.parallel.joining import leave

        leave()


def fail_together(status: int | str | None, line: str | None) -> None:
    """Ends a joined process that fails. The others are told why, and end too.

    It returns where the process was not joined to others.

    Args:
      line: what is shown. None shows the traceback of the error that is being handled.
    """
    watch = _watch()
    if watch is None:
        return
    number = status if isinstance(status, int) else 1
    try:
        if line is None:
            # An error may come from the loss of another process. Then that one is named instead.
            watch.end_if_another_is_lost()
            shown, line = traceback.format_exc(), repr(sys.exception())
        else:
            shown, line = f"{line}\n" if line else "", line or "the reader of its output has left"
        _show(shown)
        watch.shown = line.removeprefix("error: ")
        watch.tell(number, watch.shown)
    finally:
        os._exit(number)  # an ordinary end would wait for the others


def _show(text: str) -> None:
    """Writes what is left for standard output, and the text to standard error, if they take it."""
    with suppress(OSError):
        if sys.stdout:
            sys.stdout.flush()
    with suppress(OSError):
        if sys.stderr:
            sys.stderr.write(text)
            sys.stderr.flush()


def tell_hosts(status: int, line: str) -> None:
    """Tells the others that this process ends at once, as by a signal."""
    if watch := _watch():
        # In a thread: this one may have been stopped where it talks to the others.
        telling = threading.Thread(target=watch.tell, args=(status, line), daemon=True)
        telling.start()
        telling.join(timeout=10)


def _watch() -> "Watch | None":
    """The watch over the other processes; None in a process that was not joined to others."""
    if "moi_jax.parallel.hosts" not in sys.modules:
        return None
    from moi_jax.parallel.hosts import joined

    hosts = joined()
    return hosts.watch if hosts else None

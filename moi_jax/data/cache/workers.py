"""Worker processes: the items of a prepare on all cores, and how they end."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from moi_jax.common.errors import UserError
from moi_jax.data.cache.blocks import BlockBuilder, WorkItem

_builder: BlockBuilder  # of a worker process


def run_work(
    items: Sequence[WorkItem], builder: BlockBuilder, workers: int, done: Callable[[WorkItem], None]
) -> None:
    """Does the items in `workers` spawned processes; with one, in this process.

    Args:
      done: told of each item that is over, from any thread.

    Raises:
      UserError: of the first item, in their order, that raised one; or a process died.
    """
    if workers == 1:
        for item in items:
            builder.build(item)
            done(item)
        return
    context = multiprocessing.get_context("spawn")
    # Nothing is ever sent: the workers see the end of this process, or of its interest, as the
    # end of the pipe.
    reader, writer = context.Pipe(duplex=False)
    # By a file: a worker that died before it had read all of a large message would hang this
    # process, which writes it into a pipe whose other end it holds, too.
    pool = ProcessPoolExecutor(workers, context, _start, (reader, builder.save()))
    try:
        futures = [pool.submit(_build, item) for item in items]
        for item, future in zip(items, futures, strict=True):
            future.add_done_callback(lambda _, item=item: done(item))  # type: ignore[misc]
        for future in futures:
            future.result()
    except BaseException as error:
        writer.close()  # the workers leave their blocks where they are
        if not isinstance(error, BrokenProcessPool):
            raise
        raise UserError(
            f"a worker process died, perhaps for lack of memory: set data.workers below {workers} "
            f"(a script of your own needs `if __name__ == '__main__':`); what is prepared is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()
        writer.close()


def _start(reader: Connection, path: Path) -> None:
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
    threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()
    _builder = pickle.loads(path.read_bytes())
    _builder.tokenizer.use_one_thread()


def _end_with_parent(reader: Connection) -> None:
    with suppress(EOFError, OSError):
        reader.recv()
    os._exit(1)


def _build(item: WorkItem) -> None:
    _builder.build(item)

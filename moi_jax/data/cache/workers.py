"""Worker processes: build the work items of a prepare on all cores, and end with their parent."""

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

_builder: BlockBuilder  # in a worker process


def run_work(
    items: Sequence[WorkItem], builder: BlockBuilder, workers: int, done: Callable[[WorkItem], None]
) -> None:
    """Builds the items in `workers` spawned processes; one worker is this process itself.

    Args:
      done: called with each item that has ended, from any thread.

    Raises:
      UserError: that of the first item, in order, that raised one; or a process died.
    """
    if workers == 1:
        for item in items:
            builder.build(item)
            done(item)
        return
    context = multiprocessing.get_context("spawn")
    # Nothing is sent through this pipe. Its end tells the workers that this process has died, or
    # no longer needs them.
    reader, writer = context.Pipe(duplex=False)
    # The builder goes through a file. As a large message in a pipe it would hang this process,
    # which holds both ends of that pipe, if a worker died before it had read all of it.
    pool = ProcessPoolExecutor(workers, context, _start, (reader, builder.save()))
    try:
        futures = [pool.submit(_build, item) for item in items]
        for item, future in zip(items, futures, strict=True):
            future.add_done_callback(lambda _, item=item: done(item))  # type: ignore[misc]
        for future in futures:
            future.result()
    except BaseException as error:
        writer.close()  # the workers stop at once
        if not isinstance(error, BrokenProcessPool):
            raise
        raise UserError(
            f"a worker process died, perhaps for lack of memory: set data.workers below {workers} "
            f"(your own script needs `if __name__ == '__main__':`); finished blocks are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()
        writer.close()


def _start(reader: Connection, path: Path) -> None:
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()
    _builder = pickle.loads(path.read_bytes())
    _builder.tokenizer.use_one_thread()


def _end_with_parent(reader: Connection) -> None:
    with suppress(EOFError, OSError):
        reader.recv()
    os._exit(1)


def _build(item: WorkItem) -> None:
    _builder.build(item)

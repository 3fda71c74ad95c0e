"""Logging: every room logs through the standard `logging`; a command shows the log on the console.

    log = logging.getLogger(__name__)  # in a room
    log.info("lengths drawn in lengths.png")
    log.warning("domain code repeats an instruction 9 times an epoch")  # "warning: domain code ..."
    log.info(LogTable(table))  # a rich table

A command calls `show_logs` once. A notebook or another program adds handlers of its own instead.
"""

import io
import logging
from collections.abc import Callable
from typing import IO

from rich.console import Console, RenderableType

ROOT = "moi_jax"
# log.info("...", extra={EVERY_HOST: True}) is shown by every process of a run on many hosts.
EVERY_HOST = "of_every_host"
# Columns of a table that is written to a file or a pipe: enough for every cell to stay on one line.
WIDE = 1000


class LogTable:
    """A rich table as the message of a log record; as a string it is plain text."""

    def __init__(self, table: RenderableType):
        self.table = table

    def __str__(self) -> str:
        text = io.StringIO()
        _Console(text).print(self.table)
        return text.getvalue().rstrip("\n")


class _Console(Console):
    """A console that takes text literally: it reads no markup and no emoji names into it.

    Without this, rich shows "chat.jsonl:100: ..." as "chat.jsonl💯 ...".
    """

    def __init__(self, file: IO[str] | None = None, stderr: bool = False):
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)
        if not self.file.isatty():
            self.width = WIDE

    def on_broken_pipe(self) -> None:
        # rich would end the process with status 1; `run_command` knows better.
        raise


class ConsoleHandler(logging.Handler):
    """Prints one line for each message, without breaking it, and tables as tables.

    What is written to a file or a pipe has no control codes. A message that cannot be written, as
    where the disk is full, is left out: the work goes on without it. `run_command` tells it at the
    end. Only a reader that has left, as `head` does, is told at once, by BrokenPipeError.
    """

    def __init__(self, stderr: bool, warnings_to_stderr: bool, process_index: Callable[[], int]):
        super().__init__()
        self._console = _Console(stderr=stderr)
        self._warnings = _Console(stderr=stderr or warnings_to_stderr)
        self._process_index = process_index
        self.failure: OSError | None = None  # of the last message

    def emit(self, record: logging.LogRecord) -> None:
        if self._process_index() != 0 and not getattr(record, EVERY_HOST, False):
            return
        warning = record.levelno >= logging.WARNING
        try:
            self._show(record, self._warnings if warning else self._console)
            self.failure = None
        except BrokenPipeError:
            raise
        except OSError as error:
            self.failure = error

    def _show(self, record: logging.LogRecord, console: Console) -> None:
        # Captured: rich would keep what it cannot write, more and more of it.
        with console.capture() as shown:
            if isinstance(record.msg, LogTable):
                console.print(record.msg.table)
            else:
                warning = record.levelno >= logging.WARNING
                level = f"{record.levelname.lower()}: " if warning else ""
                console.print(level + self.format(record), soft_wrap=True)
        console.file.write(shown.get())
        console.file.flush()


def show_logs(
    *,
    stderr: bool = False,
    warnings_to_stderr: bool = False,
    process_index: Callable[[], int] = lambda: 0,
) -> None:
    """Shows the log on the console; a second call replaces the first.

    Args:
      stderr: write to standard error instead of standard output.
      warnings_to_stderr: write warnings to standard error in any case.
      process_index: returns the number of this process. Process 0 shows every message; the others
        show those of EVERY_HOST only, since they do and find the same.
    """
    logger = logging.getLogger(ROOT)
    for handler in [h for h in logger.handlers if isinstance(h, ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ConsoleHandler(stderr, warnings_to_stderr, process_index))
    # Some libraries give the root logger a handler, which would print each line again.
    logger.propagate = False
    logger.setLevel(logging.INFO)

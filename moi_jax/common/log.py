"""What the rooms tell while they work: the standard `logging`, shown on the console by rich.

A room takes `logging.getLogger(__name__)` and says `.info(...)`. A command calls `show_logs` once;
in a notebook, or under another program, whoever runs it decides where the lines go.
"""

import io
import logging
from typing import Any

from rich.console import Console

ROOT = "moi_jax"
TABLE_WIDTH = 100  # columns of a table in a log that is no terminal


class LogTable:
    """A rich table, or another renderable, as the message of a log record.

    On the console it is drawn by rich; everywhere else it is its plain text.
    """

    def __init__(self, renderable: Any):
        self.renderable = renderable

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=TABLE_WIDTH)
        console.print(self.renderable)
        return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


class ConsoleHandler(logging.Handler):
    """Prints each line as it is: no markup, no colours, not broken at the window's width.

    Where the output is no terminal there are no control codes in it.
    """

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, LogTable):
            self.console.print(record.msg.renderable)
            return
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            line = f"warning: {line}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_logs(*, stderr: bool = False, process_index: int = 0) -> None:
    """Shows what is logged on the console: on process 0 all of it, elsewhere warnings alone."""
    logger = logging.getLogger(ROOT)
    for handler in [h for h in logger.handlers if isinstance(h, ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ConsoleHandler(Console(stderr=stderr)))
    # Some libraries give the root logger a handler, which would print each line again.
    logger.propagate = False
    logger.setLevel(logging.INFO if process_index == 0 else logging.WARNING)

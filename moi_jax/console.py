"""Lines and progress for people on the console."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console


def say(console: Console, line: str) -> None:
    """Prints a line as it is: no markup, no colours, not broken at the window's width."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's standard error; call what it yields with the bytes done."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    off = not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=off) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)

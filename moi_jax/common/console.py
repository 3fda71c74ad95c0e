"""Lines and progress for people on the console."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich import progress
from rich.console import Console


def say(console: Console, line: str) -> None:
    """Prints a line as it is: no markup, no colours, not broken at the window's width."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def byte_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar on a terminal's standard error; call what it yields with the bytes done."""
    return _bar(what, total, progress.DownloadColumn(), progress.TransferSpeedColumn())


def count_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The same for things that are counted."""
    return _bar(what, total, progress.MofNCompleteColumn(), progress.TimeElapsedColumn())


@contextmanager
def _bar(
    what: str, total: int, *columns: progress.ProgressColumn
) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    off = not console.is_terminal
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *columns,
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=off,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)

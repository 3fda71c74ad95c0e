"""Progress bars on standard error, where that is a terminal; elsewhere there are none."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich import progress
from rich.console import Console


def byte_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar of bytes; yields a function to call with the number of bytes just done."""
    return _bar(what, total, progress.DownloadColumn(), progress.TransferSpeedColumn())


def count_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar of items; yields a function to call with the number of items just done."""
    return _bar(what, total, progress.MofNCompleteColumn(), progress.TimeElapsedColumn())


def progress_bars(*columns: progress.ProgressColumn) -> progress.Progress:
    """Several bars at once; `columns` stand between the bar and the time that remains."""
    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *columns,
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        # Not `console.is_terminal`: FORCE_COLOR makes that true for a pipe as well.
        disable=not console.file.isatty(),
    )


@contextmanager
def _bar(
    what: str, total: int, *columns: progress.ProgressColumn
) -> Iterator[Callable[[int], None]]:
    with progress_bars(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)

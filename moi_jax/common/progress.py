"""Progress bars on a terminal's standard error; nothing where it is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich import progress
from rich.console import Console


def byte_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar on a terminal's standard error; call what it yields with the bytes done."""
    return _bar(what, total, progress.DownloadColumn(), progress.TransferSpeedColumn())


def count_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """The same for things that are counted."""
    return _bar(what, total, progress.MofNCompleteColumn(), progress.TimeElapsedColumn())


def progress_bars(*columns: progress.ProgressColumn) -> progress.Progress:
    """Several bars at once, with these columns besides the usual ones."""
    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *columns,
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _bar(
    what: str, total: int, *columns: progress.ProgressColumn
) -> Iterator[Callable[[int], None]]:
    with progress_bars(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)

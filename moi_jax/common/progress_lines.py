"""Lines about long work in a file, one a minute, for whoever looks without a terminal."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

EVERY = 60.0  # seconds

# Parts of the work that are done, and the tokens that they have.
State = tuple[int, int]


@contextmanager
def progress_lines(
    path: Path | None,
    what: str,
    total: int,
    state: Callable[[], State],
    every: float = EVERY,
) -> Iterator[None]:
    """Appends lines to `path` during the block: at its begin, each minute, and at its end.

        2026-11-26 21:40:03 gsm8k answers: 120 of 1,319, 31 tokens/s, 1:12:40 to go

    A line that cannot be written is left out, since the work matters more.

    Args:
      path: None writes nothing.
      total: the number of parts.
      state: called from another thread.
      every: seconds between two lines.
    """
    if path is None:
        yield
        return
    begun, first = time.monotonic(), state()
    ended = threading.Event()

    def write() -> None:
        line = f"{what}: {_describe(total, first, state(), time.monotonic() - begun)}"
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def write_on() -> None:
        while not ended.wait(every):
            write()

    write()
    thread = threading.Thread(target=write_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()


def _describe(total: int, first: State, now: State, seconds: float) -> str:
    """How far the work is. The rate and the rest are of what was done since `first`."""
    done, tokens = now[0] - first[0], now[1] - first[1]
    parts = [f"{now[0]:,} of {total:,}"]
    if tokens and seconds:
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    if done and now[0] < total:
        parts.append(f"{_clock(seconds / done * (total - now[0]))} to go")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    """1:02:03"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"

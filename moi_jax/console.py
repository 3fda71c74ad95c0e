"""Lines for people on the console."""

from rich.console import Console


def say(console: Console, line: str) -> None:
    """Prints a line as it is: no markup, no colours, not broken at the window's width."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)

"""What a model's free text says: lenient loading of literals and JSON, and text between marks."""

import ast
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

FENCE = "```json"


def clean(text: str) -> str:
    """An answer without the code fence around it."""
    return text.strip().removeprefix(FENCE).strip("`").strip()


def load_lenient(text: str, opening: str = "", closing: str = "") -> Any:
    """What the text holds as a Python literal, else as JSON, else as JSON in single quotes.

    Args:
      opening, closing: brackets; what is before the first and after the last is dropped.

    Returns:
      None where it is none of these; never raises.
    """
    if FENCE in text:
        text = text[text.find(FENCE) + len(FENCE) :].strip("`")
    start = text.find(opening)
    end = text.rfind(closing) + len(closing)
    if start < 0 or end < len(closing):
        return None
    text = text[start:end]
    loads: list[Callable[[str], Any]] = [
        load_literal,
        json.loads,
        lambda text: json.loads(text.replace("'", '"')),
    ]
    for load in loads:
        try:
            return load(text)
        except (ValueError, RecursionError):
            continue
    return None


def load_literal(text: str) -> Any:
    """The Python literal that the text is.

    Raises:
      ValueError: it is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of escapes that Python does not know
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python literal: {error}") from None


def as_text(value: Any) -> str:
    """`str(value)`, of anything that was loaded, fit to be encoded; "" where it has none.

    Python's literals read JSON's escapes of an emoji as two surrogates: here they are one again.
    """
    try:
        return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, RecursionError):  # an integer of too many digits, lists too deep
        return ""


def between(text: str, marks: Sequence[str]) -> tuple[str, ...] | None:
    """The texts between each two of the marks; None unless all are there, in order.

    As the regular expression "mark(.*)mark(.*)mark" finds them, a dot matching newlines too: the
    first mark where it is first, the others where they are last. In linear time, though.
    """
    start = text.find(marks[0])
    if start < 0:
        return None
    start += len(marks[0])
    end = text.rfind(marks[-1], start)
    parts: list[str] = []
    for mark in reversed(marks[1:-1]):
        at = text.rfind(mark, start, end) if end >= start else -1
        parts.append(text[at + len(mark) : end])
        end = at
    if end < start:
        return None
    return (text[start:end], *reversed(parts))

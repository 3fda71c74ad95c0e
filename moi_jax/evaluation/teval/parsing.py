"""Parses a model's free text: lenient loading of literals and JSON, and text between marks."""

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
    """Parses text as a Python literal, else as JSON, else as JSON with single quotes.

    Args:
      opening, closing: brackets; text before the first and after the last one is dropped.

    Returns:
      The value; None where the text is none of these. It never raises an exception.
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
    """Parses text as a Python literal.

    Raises:
      ValueError: it is not a literal.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as warnings about unknown escapes
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python literal: {error}") from None


def as_text(value: Any) -> str:
    """`str(value)` of a loaded value, as text that can be encoded; "" where this is impossible.

    A Python literal reads JSON's escapes of an emoji as two surrogates. Here they are joined.
    """
    try:
        return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, RecursionError):  # an integer of too many digits, lists too deep
        return ""


def between(text: str, marks: Sequence[str]) -> tuple[str, ...] | None:
    """The texts between neighbouring marks; None unless all marks are there in order.

    The result is that of the regular expression "mark(.*)mark(.*)mark" whose dot matches newlines:
    the first occurrence of the first mark, the last ones of the others. But it needs only linear
    time.
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

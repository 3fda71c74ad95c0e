"""How a template writes calls of tools, and how they are read from the text of an answer.

A call has one of three bodies:

    {"name": "weather", "arguments": {"city": "Oslo"}}     ObjectBody
    weather[ARGS]{"city": "Oslo"}                          NamedBody
    <function=weather><parameter=city>Oslo</parameter>     ListedBody
"""

import ast
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from moi_jax.text.conversations import ToolCall

Json = dict[str, Any]
CallId = "\uf8e3"  # stands for the id of a call in the fixed text around it
ID = r"[\w.:-]*"
NAME = re.compile(r"[\w.:-]+")
DECODER = json.JSONDecoder(strict=False)
# Types of arguments by (tool, argument), as the tools' JSON schemas have them.
Types = Mapping[tuple[str, str], str]


class Body(Protocol):
    """The part of a call that has its name and arguments."""

    def read(self, text: str, at: int, types: Types) -> tuple[ToolCall, int] | None:
        """The call at a place in the text, and where it ends; None if there is none."""


@dataclass(frozen=True)
class CallForm:
    """How calls stand in an answer: `begin` BODY `between` BODY ... `ending`.

    Attributes:
      begin: the text before the first call; "" if there is none.
      between: the text between two calls; None if the template writes one call only.
      ending: the text after the last call, in pieces: its special tokens stand alone. An answer
        ends at one of them, and does not hold those behind it.
      example: the text of a call, by which people and servers know the form.
    """

    begin: str
    between: str | None
    ending: tuple[str, ...]
    body: Body
    example: str

    def read(
        self, text: str, types: Types, listed: Collection[str]
    ) -> tuple[str, tuple[ToolCall, ...]]:
        """The text before and after the calls, and the calls.

        Args:
          listed: the names of the tools. Where no words begin a call, the call of any other tool is
            text: the answer may be JSON for a reader.

        Returns:
          No calls if not all of them can be read.
        """
        for start, at in self._begins(text):
            calls, end = self._calls(text, at, types)
            if calls and (self.begin.strip() or all(call.name in listed for call in calls)):
                around = (text[:start].strip(), text[end:].strip())
                return "\n".join(filter(None, around)), calls
        return text, ()

    def _calls(self, text: str, at: int, types: Types) -> tuple[tuple[ToolCall, ...], int]:
        """The calls that stand one after the other, and where their ending ends."""
        calls: list[ToolCall] = []
        while found := self.body.read(text, at, types):
            call, end = found
            calls.append(call)
            more = None if self.between is None else after(self.between, text, end)
            if more is None:
                return tuple(calls), self._after_ending(text, end)
            at = more
        if calls and not (self.between or "").strip():  # no words announce another call
            return tuple(calls), self._after_ending(text, end)
        return (), at

    def _after_ending(self, text: str, at: int) -> int:
        for piece in self.ending:
            end = after(piece, text, at)
            if end is None:
                break
            at = end
        return at

    def _begins(self, text: str) -> Iterator[tuple[int, int]]:
        """Where calls may begin: the place, and the place after `begin`."""
        if self.begin.strip():
            for found in literal(self.begin).finditer(text):
                yield found.span()
        else:
            yield 0, len(text) - len(text.lstrip())


@dataclass(frozen=True)
class ObjectBody:
    """A JSON object with the name and the arguments under these keys."""

    name: str
    arguments: str

    def read(self, text: str, at: int, types: Types) -> tuple[ToolCall, int] | None:
        found = json_object(text, at)
        if found is None or not isinstance(name := found[0].get(self.name), str):
            return None
        if self.arguments not in found[0]:
            return None
        arguments, identifier = found[0][self.arguments] or {}, found[0].get("id")
        if isinstance(arguments, str):
            inner = json_object(arguments, 0)
            arguments = inner[0] if inner else None
        if not isinstance(arguments, dict):
            return None
        call = ToolCall(name, one_line(arguments), identifier if type(identifier) is str else "")
        return call, found[1]


@dataclass(frozen=True)
class NamedBody:
    """A name, a text between, and the arguments as a JSON object."""

    middle: str

    def read(self, text: str, at: int, types: Types) -> tuple[ToolCall, int] | None:
        name = NAME.match(text, at)
        middle = name and after(self.middle, text, name.end())
        if name is None or middle is None or not (found := json_object(text, middle)):
            return None
        return ToolCall(name.group(), one_line(found[0])), found[1]


@dataclass(frozen=True)
class ListedBody:
    """A name, then each argument with its name.

    Attributes:
      opening, equals, separator, closing: what is before the first argument's name, between its
        name and its value, between two arguments, and after the last value.
      empty: what is after the name of a tool that is called without arguments.
      quote: stands around texts, and other values are literals of JSON or Python; "" if all values
        are written as they are.
    """

    opening: str
    equals: str
    separator: str
    closing: str
    empty: str
    quote: str

    def read(self, text: str, at: int, types: Types) -> tuple[ToolCall, int] | None:
        found = NAME.match(text, at)
        if found is None:
            return None
        name, at = found.group(), found.end()
        begin = after(self.opening, text, at)
        key = None if begin is None else NAME.match(text, begin)
        if key is None:
            end = after(self.empty, text, at)
            return None if end is None else (ToolCall(name, "{}"), end)
        arguments: Json = {}
        while key:
            value = self._value(text, key.end(), types.get((name, key.group())))
            if value is None:
                return None
            arguments[key.group()], at, more = value
            if not more:
                return ToolCall(name, one_line(arguments)), at
            key = NAME.match(text, at)
        return None

    def _value(self, text: str, at: int, kind: str | None) -> tuple[Any, int, bool] | None:
        """A value, the place after it and what follows it, and whether another one follows."""
        if not text.startswith(self.equals, at):
            return None
        at += len(self.equals)
        closing = re.escape(self.closing) or r"\Z"
        places = re.compile(f"({re.escape(self.separator)})|{closing}")
        for found in places.finditer(text, at):
            raw, following, more = text[at : found.start()], found.end(), bool(found.group(1))
            if not self.quote:
                return typed(raw, kind), following, more
            if value := python_or_json(raw) or self._unquoted(raw):
                return value[0], following, more
        return None

    def _unquoted(self, raw: str) -> tuple[str] | None:
        """The text in quotes; some templates do not escape what is in it."""
        size = len(self.quote)
        quoted = len(raw) >= 2 * size and raw.startswith(self.quote) and raw.endswith(self.quote)
        return (raw[size:-size],) if quoted else None


def typed(raw: str, kind: str | None) -> Any:
    """The value of an argument that is written as plain text, by the type in its schema."""
    if kind in (None, "string"):
        return raw
    found = python_or_json(raw)
    return found[0] if found else raw


def python_or_json(text: str) -> tuple[Any] | None:
    """The value of a literal of JSON or Python; None if it is neither."""
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        try:
            value = read(text.strip())
            json.dumps(value)  # Python has literals that JSON has not
            return (value,)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def json_object(text: str, at: int) -> tuple[Json, int] | None:
    """The JSON object at a place in the text, and where it ends; None if there is none."""
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        value, end = DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


def one_line(arguments: Json) -> str:
    """Arguments as a `ToolCall` has them."""
    return json.dumps(arguments, ensure_ascii=False)


def after(fixed: str, text: str, at: int) -> int | None:
    """The place after the fixed text that stands at `at`; None if it does not stand there."""
    found = literal(fixed).match(text, at)
    return found.end() if found else None


@lru_cache(maxsize=256)
def literal(fixed: str) -> re.Pattern[str]:
    """Finds a fixed text; models write white space around it in other ways."""
    words = [re.escape(word).replace(CallId, ID) for word in fixed.split()]
    if not words:
        return re.compile(r"\s+" if fixed else "")
    ends = (r"\s*" if fixed[0].isspace() else "", r"\s*" if fixed[-1].isspace() else "")
    return re.compile(ends[0] + r"\s*".join(words) + ends[1])

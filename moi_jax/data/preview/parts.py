"""Parts of an instruction's text for people to tell apart: thinking, calls of tools, results."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from moi_jax.text.conversations import Message
from moi_jax.text.jinja.rendering import from_json
from moi_jax.text.tokenizer import Tokenizer

Kind = Literal["thinking", "call", "result"]
# Decoding gives this for the bytes of a character that is not complete yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# How most templates mark the parts. They are found like this also in plain text.
MARKED: dict[Kind, re.Pattern[str]] = {
    "thinking": re.compile(r"<think>.*?(?:</think>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)", re.DOTALL),
    "call": re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL),
    "result": re.compile(
        r"<tool_response>.*?</tool_response>|\[TOOL_RESULTS\].*?\[/TOOL_RESULTS\]", re.DOTALL
    ),
}


class Part(NamedTuple):
    """Tokens [start, end) of an instruction."""

    start: int
    end: int
    kind: Kind


def find_parts(tokens: Sequence[int], conversation: str, tokenizer: Tokenizer) -> list[Part]:
    """The parts of an instruction, in their order.

    They are looked up in the text by the words of the conversation, if these are known, or else by
    the marks of common templates. It is meant for the eye: a part that a template writes in other
    words than its conversation has is not found.

    Args:
      conversation: see `Instruction.conversation`.
    """
    text = tokenizer.decode(tokens)
    found = list(_by_words(text, conversation) if conversation else _by_marks(text))
    ends = token_ends(tokens, tokenizer) if found else []
    return [
        Part(bisect_right(ends, start), bisect_right(ends, end - 1) + 1, kind)
        for start, end, kind in sorted(found)
        if start < end
    ]


def token_ends(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """How many characters the text of the tokens up to and with each of them has.

    Each token is decoded behind the one before it, and behind all those with which it makes up a
    character, so the work is linear in the tokens.
    """
    ends: list[int] = []
    begin = length = 0  # the token that the next ones are decoded behind, and its characters
    before = 0  # characters up to and with it
    for number in range(len(tokens)):
        text = tokenizer.decode(tokens[begin : number + 1])
        ends.append(before + len(text) - length)
        if not text.endswith(REPLACEMENT):
            begin, before = number, ends[-1]
            length = len(tokenizer.decode(tokens[number : number + 1]))
    return ends


def _by_marks(text: str) -> Iterator[tuple[int, int, Kind]]:
    for kind, pattern in MARKED.items():
        for match in pattern.finditer(text):
            yield match.start(), match.end(), kind


def _by_words(text: str, conversation: str) -> Iterator[tuple[int, int, Kind]]:
    at = 0
    for message in from_json(conversation)[0].messages:
        for words, kind in _words(message):
            start, end = _place(text, words, at) if kind != "call" else _call(text, words, at)
            if start >= 0:
                at = end
                if kind:
                    yield start, end, kind


def _words(message: Message) -> list[tuple[str, Kind | None]]:
    """The texts of a message in the order in which templates write them; None: no part."""
    if message.role == "tool":
        return [(message.content, "result")]
    calls: list[tuple[str, Kind | None]] = [(call.name, "call") for call in message.calls]
    return [(message.thinking, "thinking"), (message.content, None), *calls]


def _place(text: str, words: str, at: int) -> tuple[int, int]:
    """Where the words stand in the text from `at` on; (-1, -1) if they do not."""
    words = words.strip()
    start = text.find(words, at) if words else -1
    return (start, start + len(words)) if start >= 0 else (-1, -1)


def _call(text: str, name: str, at: int) -> tuple[int, int]:
    """Where the call of a tool stands: the JSON object that holds its name, or the name alone."""
    start, end = _place(text, name, at)
    brace = text.rfind("{", at, start)
    if start >= 0 and brace >= 0:
        try:
            _, after = json.JSONDecoder().raw_decode(text, brace)
        except ValueError:
            return start, end
        if after >= end:
            return brace, after
    return start, end

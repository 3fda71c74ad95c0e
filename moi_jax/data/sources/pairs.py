"""Pairs: reads rows that hold a question and its answer in fields of their own.

{"instruction": "Translate.", "input": "Bonjour", "output": "Hello"}
{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
{"prompt": "2 + 2 =", "completion": " 4"}
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from reprlib import repr as shown  # the content of a row may be of any length and depth
from typing import Any, TypeGuard

from moi_jax.data.sources.events import Call, Event, Observation, Thought
from moi_jax.data.sources.readers import decode
from moi_jax.data.sources.turns import CHAT_ROLES, Reader, text_of, turns
from moi_jax.text.conversations import BadRow, Message, Role

Row = Mapping[str, Any]
# The keys that may hold the choices of a question, and the right one.
CHOICES, RIGHT = ("choices", "options"), ("answer", "answerKey")


def pair(question_key: str, *answer_keys: str) -> Reader:
    """A reader of rows with one question and one answer, which stands in the first of the keys."""

    def events(row: Row) -> list[Event]:
        return [
            Message("user", _joined(context_of(row) or "", text_of(row, question_key))),
            Message("assistant", text_of(row, _present(row, answer_keys))),
        ]

    return events


def alpaca(row: Row) -> list[Event]:
    """An instruction with its material, the answer, and perhaps earlier turns."""
    material = _optional(row, "input"), context_of(row) or ""
    question = _joined(text_of(row, "instruction"), *material)
    answer = text_of(row, _present(row, ("output", "response")))
    return [*_history(row), Message("user", question), Message("assistant", answer)]


def _present(row: Row, keys: Sequence[str]) -> str:
    """The first of the keys that has a value in the row; the first of all if none has."""
    return next((key for key in keys if row.get(key) is not None), keys[0])


def _optional(row: Row, key: str) -> str:
    return "" if row.get(key) is None else text_of(row, key)


def context_of(row: Row) -> str | None:
    """The text of the key `context`; None if it is no text, such as an object of passages."""
    try:
        return _optional(row, "context")
    except BadRow as bad:
        if bad.reason == "content_not_text":
            return None
        raise


def _joined(*texts: str) -> str:
    """The texts that are not blank, with a blank line between them; a single one is not changed."""
    return "\n\n".join(text for text in texts if text.strip())


def _history(row: Row) -> list[Event]:
    """The earlier turns of an Alpaca row, which are pairs of question and answer."""
    events: list[Event] = []
    history = row.get("history") or []
    if isinstance(history, str):  # of a CSV file
        history = decode(history, "bad_history") if history.strip() else []
    for earlier in history if isinstance(history, list) else [None]:
        if not (
            isinstance(earlier, list)
            and len(earlier) == 2
            and all(isinstance(text, str) for text in earlier)
        ):
            raise BadRow("bad_history", "'history' is not a list of pairs of texts")
        events += [Message("user", earlier[0]), Message("assistant", earlier[1])]
    return events


def multiple_choice(row: Row) -> list[Event]:
    """A question with its choices, one in each line as `A. text`, and the right one as answer.

    A question whose choices are an empty cell is an open one, and its answer is a text.
    """
    choices = row.get(_present(row, CHOICES))
    if isinstance(choices, str) and not choices.strip():
        return pair("question", *RIGHT)(row)
    labels, texts = _choices(choices)
    lines = [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]
    right = _right(row.get(_present(row, RIGHT)), labels, texts, isinstance(choices, str))
    question = _joined(context_of(row) or "", text_of(row, "question"), "\n".join(lines))
    return [Message("user", question), Message("assistant", lines[right])]


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """(labels, texts) of the choices, or of their JSON text.

    They are ["3", "4"], {"A": "3", "B": "4"} or {"label": ["A", "B"], "text": ["3", "4"]}.
    """
    if isinstance(value, str):
        value = decode(value, "bad_choices")
    labels: Any = None
    if isinstance(value, dict) and "text" in value:
        labels, value = value.get("label"), value["text"]
    elif isinstance(value, dict):
        labels, value = list(value), list(value.values())
    if not _are_texts(value):
        raise BadRow("bad_choices", f"the choices are not texts: {shown(value)}")
    if labels is None:
        labels = list(string.ascii_uppercase[: len(value)])
    if not _are_texts(labels) or len(labels) != len(value):
        raise BadRow("bad_choices", f"not every one of the {len(value)} choices has a label")
    return labels, value


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _right(answer: Any, labels: list[str], texts: list[str], in_table: bool) -> int:
    """The index of the right choice. The answer is its index, its label or its text.

    Args:
      in_table: the row is of a CSV file, where an index is written as a text.
    """
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str):
        plain = answer.strip()
        labels, texts = ([name.strip() for name in names] for names in (labels, texts))
        if plain in labels:
            return labels.index(plain)
        indices = [str(index) for index in range(len(texts))]
        places = [names.index(plain) for names in (texts, indices) if plain in names]
        if in_table and len(set(places)) > 1:
            raise BadRow(
                "bad_choices",
                f"the answer {plain} is the index of one choice and the text of another; write "
                f"its label",
            )
        if places:
            return places[0]
    raise BadRow("bad_choices", f"the answer {shown(answer)} is none of {len(texts)} choices")


def prompt_completion(row: Row) -> list[Event]:
    """A prompt and its completion, each a text or a list of turns; the prompt carries no loss."""
    answer = _present(row, ("completion", "response"))
    prompt = [_untrained(event) for event in _side(row, "prompt", "user")]
    if isinstance(prompt[-1] if prompt else None, Call | Observation):
        raise BadRow(
            "split_turn",
            "the prompt ends with a call or its result, so the completion goes on with a turn that "
            "is not trained as a whole; write all turns as 'messages'",
        )
    return [*prompt, *_side(row, answer, "assistant")]


def _side(row: Row, key: str, role: Role) -> list[Event]:
    value = row.get(key)
    if isinstance(value, list) or _is_json_of_turns(value):
        return turns(key, "role", "content", CHAT_ROLES)(row)
    return [Message(role, text_of(row, key))]


def _is_json_of_turns(value: Any) -> bool:
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return False
    with suppress(BadRow):
        listed = decode(value)
        return bool(listed) and all(isinstance(turn, dict) and "role" in turn for turn in listed)
    return False


def _untrained(event: Event) -> Event:
    if isinstance(event, Message):
        return dataclasses.replace(event, train=event.role != "assistant")
    return event._replace(weight=0.0) if isinstance(event, Thought | Call) else event

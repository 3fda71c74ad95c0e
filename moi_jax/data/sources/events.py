"""Events: what happens in a chat, one after the other, before it is written as messages.

    user: Is it cold in Oslo?     Message("user", "Is it cold in Oslo?")
    assistant, calls a tool       Call("weather", '{"city": "Oslo"}', "1")
    tool                          Observation("-3 °C", "1")
    assistant                     Message("assistant", "Yes, -3 °C.")

Every format of rows is read as events. `native` and `react` write them as messages.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moi_jax.text.conversations import Message, Role

THINKING = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)


class Thought(NamedTuple):
    """A thought of the assistant, before it calls a tool or answers."""

    text: str
    weight: float = 1.0


class Call(NamedTuple):
    """A call of a tool.

    Attributes:
      arguments: a JSON object on one line.
      id: "" if there is none.
      weight: of its labels; 0 means that it is not trained on.
      thought: what the assistant says between this call and the one made together with it before.
    """

    name: str
    arguments: str
    id: str = ""
    weight: float = 1.0
    thought: str = ""


class Observation(NamedTuple):
    """The result of a tool; `id` is that of its call, "" if there is none."""

    text: str
    id: str = ""


# A chat is a sequence of events. An assistant's Message before a Call is the thought of the call.
Event = Message | Thought | Call | Observation


def message(role: Role, text: str, weight: float, **parts: Any) -> Message:
    """A message whose labels have this weight; with 0 it is not trained on."""
    return Message(role, text, weight > 0, weight=weight or 1.0, **parts)


def with_think_block(thinking: str, text: str) -> str:
    """The text of an answer with its thinking before it, as Qwen and DeepSeek write it."""
    return f"<think>\n{thinking}\n</think>\n\n{text}"


def weighed(message: Message, factor: float) -> Message:
    """The message with its weight multiplied by a factor."""
    weight = message.weight * factor
    return replace(message, train=message.train and weight > 0, weight=weight or 1.0)


def weight_of(event: Message | Thought | Call) -> float:
    """The weight of the labels of an event; 0 if it is not trained on."""
    if isinstance(event, Message):
        return event.weight if event.train else 0.0
    return event.weight


def apart(events: Sequence[Event]) -> Iterator[Event]:
    """The events; the <think> block that begins an answer becomes a thought before it.

    A thought that the row gives a second time, in a key of its own, stays one.
    """
    before: Event | None = None
    for event in events:
        if (
            isinstance(event, Message)
            and event.role == "assistant"
            and (block := THINKING.match(event.content))
        ):
            weight, text = weight_of(event), block.group(1).strip("\n")
            if not (isinstance(before, Thought) and before.text.strip() == text.strip()):
                yield Thought(text, weight)
            event = message("assistant", event.content[block.end() :], weight)
        yield event
        before = event

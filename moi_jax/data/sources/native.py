"""Native: writes calls of tools and their results as messages of their own, for the chat template.

    Message("assistant", "", calls=(ToolCall("weather", '{"city": "Oslo"}', "1"),))
    Message("tool", "-3 °C, snow", call_id="1", name="weather")
    Message("assistant", "It snows in Oslo.")

`react` writes them as text in one message.
"""

import hashlib
from collections.abc import Iterable, Iterator

from moi_jax.data.sources.answers import Answer, Step, assembled
from moi_jax.data.sources.events import Call, Event, message, with_think_block
from moi_jax.text.conversations import Message, ToolCall


def to_messages(events: Iterable[Event], thinking: bool, unfinished: bool = False) -> list[Message]:
    """The messages of a row; results stand in the order of their calls.

    Args:
      thinking: thoughts stand apart in the message, else as a block before its content.
      unfinished: the chat may end with results.

    Raises:
      BadRow: calls and results do not match, or an answer is empty.
    """
    messages: list[Message] = []
    for item in assembled(events, typed=True, unfinished=unfinished):
        if isinstance(item, Answer):
            for step in item.steps:
                messages += _messages(step, thinking, len(messages))
        else:
            messages.append(item)
    return messages


def _messages(step: Step, thinking: bool, place: int) -> Iterator[Message]:
    """The messages of a step, of which the first has this place in the row."""
    calls = [made.call for made in step.calls]
    between = [call.thought for call in calls if call.thought.strip()]
    content = "\n\n".join(filter(None, [step.said, *between]))
    thoughts = "\n\n".join(step.thoughts)
    if thoughts and not thinking:
        content, thoughts = with_think_block(thoughts, content), ""
    typed = tuple(_tool_call(call, f"{place} {number}") for number, call in enumerate(calls))
    yield message("assistant", content, step.weight or 0.0, thinking=thoughts, calls=typed)
    for call, made in zip(typed, step.calls, strict=True):
        if made.result is not None:
            yield Message("tool", made.result, call_id=call.id, name=call.name)


def _tool_call(call: Call, place: str) -> ToolCall:
    """The call. If the row gives no id, it gets one of the form that Mistral's templates need."""
    text = f"{place} {call.name} {call.arguments}"
    made_up = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]
    return ToolCall(call.name, call.arguments, call.id or made_up)

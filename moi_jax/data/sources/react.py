"""ReAct: writes calls of tools and their results as one assistant turn, the form Qwen v1 learns.

    Thought: I need to call weather.
    Action: weather
    Action Input: {"city": "Oslo"}
    Observation: -3 °C, snow
    Thought: I now know the final answer.
    Final Answer: It snows in Oslo.

The first user turn describes the tools and this form, and then asks the question.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shown  # an id may be of any length
from typing import Any, NamedTuple

from moi_jax.data.sources.readers import decode
from moi_jax.text.conversations import BadRow, Message

# The words that structure a turn. Inside a text they get a space before them, so that neither a
# reader of the turn nor the mask of observations (rendering.py) takes them for structure.
MARK = re.compile(r"\n(?=(?:Thought|Action|Action Input|Observation|Final Answer):)")
LAST_THOUGHT = "I now know the final answer."


class Thought(NamedTuple):
    """A thought of the assistant, before it calls a tool or answers."""

    text: str
    train: bool = True


class Call(NamedTuple):
    """A call of a tool.

    Attributes:
      arguments: a JSON object on one line.
      id: "" if there is none.
      thought: what the assistant says between this call and the one made together with it before.
    """

    name: str
    arguments: str
    id: str = ""
    train: bool = True
    thought: str = ""


class Observation(NamedTuple):
    """The result of a tool; `id` is that of its call, "" if there is none."""

    text: str
    id: str = ""


# A chat is a sequence of events. An assistant's Message before a Call is the thought of the call.
Event = Message | Thought | Call | Observation


class Tool(NamedTuple):
    """The description of a tool in the prompt; `parameters` is JSON."""

    name: str
    description: str
    parameters: str


def compact(value: Any, reason: str) -> str:
    """The value as JSON on one line; raises BadRow(reason) if it has no JSON form."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(reason, str(error)) from None


def tool_list(row: Mapping[str, Any]) -> list[Tool]:
    """The row's `tools` or `functions`: a list, or the JSON text of one.

    Raises:
      BadRow: they are not a list of objects with a name.
    """
    tools = []
    for key in ("tools", "functions"):
        value = row.get(key)
        if isinstance(value, str):
            value = decode(value, "bad_tools") if value.strip() else None
        if value is None:
            continue
        if not isinstance(value, list):
            raise BadRow("bad_tools", f"{key!r} is {type(value).__name__}")
        tools += [_tool(entry) for entry in value]
    return tools


def named_function(entry: Any, reason: str) -> tuple[str, Mapping[str, Any]]:
    """(name, object) of a tool or call, which may be nested below "function".

    Raises:
      BadRow: it has no valid name (`reason`).
    """
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict):
        raise BadRow(reason, f"an entry is a {type(entry).__name__}, not a function")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise BadRow(reason, "a function has no name on one line")
    return name.strip(), function


def _tool(entry: Any) -> Tool:
    name, function = named_function(entry, "bad_tools")
    description = function.get("description")
    if not isinstance(description, str | None):
        raise BadRow("bad_tools", f"the description of {name} is {type(description).__name__}")
    parameters = compact(function.get("parameters") or {}, "bad_tools")
    return Tool(name, (description or "").strip(), parameters)


def tool_prompt(tools: Sequence[Tool], question: str) -> str:
    """The first user turn of a row with tools."""
    listed = "\n".join(
        f"{name}: {description} Parameters: {parameters}" if description else
        f"{name}: Parameters: {parameters}"
        for name, description, parameters in tools
    )  # fmt: skip
    return (
        f"Answer the question as well as you can. You may use these tools:\n\n{listed}\n\n"
        f"Use this format:\n\n"
        f"Question: the question you must answer\n"
        f"Thought: what you think should be done next\n"
        f"Action: the tool to use, one of [{', '.join(tool.name for tool in tools)}]\n"
        f"Action Input: what the tool gets, as a JSON object\n"
        f"Observation: what the tool returned\n"
        f"... (from Thought to Observation as often as needed)\n"
        f"Thought: {LAST_THOUGHT}\n"
        f"Final Answer: the answer to the question\n\n"
        f"Begin!\n\nQuestion: {question}"
    )


def to_messages(events: Sequence[Event], tools: Sequence[Tool]) -> list[Message]:
    """The messages of a row that has tools, calls or thoughts.

    Raises:
      BadRow: calls and observations do not match.
    """
    messages: list[Message] = []
    turn = _Turn(bool(tools))
    for event in events:
        if isinstance(event, Message) and event.role != "assistant":
            messages += turn.close(last=False)
            turn = _Turn(bool(tools))
            messages.append(event)
        else:
            turn.add(event)
    messages += turn.close(last=True)
    first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    if tools and first is not None:
        question = messages[first]
        messages[first] = Message("user", tool_prompt(tools, question.content), question.train)
    return messages


@dataclass
class _OpenCall:
    """A call that is not written yet: its own result, or that of an earlier call, is missing."""

    thought: str
    call: Call
    result: str | None = None


class _Turn:
    """An assistant turn that is being written."""

    def __init__(self, with_tools: bool) -> None:
        self.with_tools = with_tools
        self.steps: list[str] = []
        self.thoughts: list[str] = []
        self.said: str | None = None
        self.calls: list[_OpenCall] = []
        self.train: bool | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Observation):
            self._answer_call(event)
            return
        if self.train not in (None, event.train):
            raise BadRow("bad_weight", "parts of a turn that calls tools differ in weight or train")
        self.train = event.train
        if isinstance(event, Call):
            if self.said is not None:
                self.thoughts.append(self.said)
                self.said = None
            self.thoughts.append(event.thought)
            thought = self._thought(f"I need to call {event.name}.")
            self.calls.append(_OpenCall(thought, event))
            return
        if self.calls:
            raise self._unanswered()
        if isinstance(event, Thought):
            if event.text.strip():
                self.thoughts.append(event.text)
        elif self.said is not None:
            raise BadRow("roles_not_alternating", "two turns in a row are both assistant's")
        else:
            self.said = event.content

    def _thought(self, otherwise: str) -> str:
        """The thoughts since the last step, or `otherwise` if there are none."""
        texts = [text.strip().removeprefix("Thought:").strip() for text in self.thoughts]
        self.thoughts = []
        return _inside("\n\n".join(filter(None, texts))) or otherwise

    def _answer_call(self, observation: Observation) -> None:
        """Gives the result to its call; calls are written in the order in which they were made."""
        waiting = [call for call in self.calls if call.result is None]
        if not waiting:
            raise BadRow("observation_without_call", "a tool returns a result without a call")
        if observation.id:
            waiting = [call for call in waiting if call.call.id == observation.id]
        if not waiting:
            raise BadRow(
                "observation_without_call", f"no open call has the id {shown(observation.id)}"
            )
        waiting[0].result = f" {_inside(observation.text.strip())}"
        while self.calls and self.calls[0].result is not None:
            self._step(self.calls.pop(0))

    def _step(self, open_call: _OpenCall) -> None:
        call = open_call.call
        self.steps.append(
            f"Thought: {open_call.thought}\nAction: {call.name}\n"
            f"Action Input: {call.arguments}\nObservation:{open_call.result or ''}"
        )

    def _unanswered(self) -> BadRow:
        return BadRow("call_without_observation", f"{self.calls[0].call.name} returned nothing")

    def close(self, last: bool) -> Iterator[Message]:
        """Yields the finished turn, or nothing if the assistant had no turn.

        The last call of a chat may have no result: the turn then ends where generation stops.
        """
        if self.train is None:
            return
        calls_tools = bool(self.steps or self.calls)
        if self.calls:
            if not last or len(self.calls) > 1:
                raise self._unanswered()
            self._step(self.calls[0])
        elif self.said is None:
            if self.steps:
                raise BadRow("unanswered_observation", "no call or answer follows an observation")
            raise BadRow("empty_assistant", "the assistant has thoughts but no answer")
        elif not self.said.strip():
            raise BadRow("empty_assistant", "an assistant turn is empty")
        elif self.steps or (self.with_tools and self.thoughts):
            thought = self._thought(LAST_THOUGHT)
            self.steps.append(f"Thought: {thought}\nFinal Answer: {_inside(self.said)}")
        elif self.thoughts:
            thought = "\n\n".join(self.thoughts)
            self.steps.append(f"<think>\n{thought}\n</think>\n\n{self.said}")
        else:
            self.steps.append(self.said)
        yield Message("assistant", "\n".join(self.steps), self.train, calls_tools)


def _inside(text: str) -> str:
    """The text, changed so that no line begins with one of the words that structure a turn."""
    return MARK.sub("\n ", text)

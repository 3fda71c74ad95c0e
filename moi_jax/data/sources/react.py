"""ReAct: writes calls of tools and their results as one assistant turn, the form Qwen v1 learns.

    Thought: I need to call weather.
    Action: weather
    Action Input: {"city": "Oslo"}
    Observation: -3 °C, snow
    Thought: I now know the final answer.
    Final Answer: It snows in Oslo.

The first user turn describes the tools and this form, and then asks the question.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moi_jax.data.sources.answers import Answer, assembled
from moi_jax.data.sources.events import Event, message, with_think_block
from moi_jax.data.sources.tools import compact, description_of, named_function
from moi_jax.text.conversations import Message

# The words that structure a turn. Inside a text they get a space before them, so that neither a
# reader of the turn nor the mask of observations (rendering.py) takes them for structure.
MARK = re.compile(r"\n(?=(?:Thought|Action|Action Input|Observation|Final Answer):)")
LAST_THOUGHT = "I now know the final answer."


class Tool(NamedTuple):
    """The description of a tool in the prompt; `parameters` is JSON."""

    name: str
    description: str
    parameters: str


def described(entry: Any) -> Tool:
    """An entry of the row's tools.

    Raises:
      BadRow: it has no name, or its parameters have no JSON form.
    """
    name, function = named_function(entry, "bad_tools")
    parameters = compact(function.get("parameters") or {}, "bad_tools")
    return Tool(name, description_of(name, function), parameters)


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


def to_messages(events: Iterable[Event], tools: Sequence[Tool], thinking: bool) -> list[Message]:
    """The messages of a row that has tools, calls or thoughts.

    Args:
      thinking: the thoughts of an answer without tools stand apart in its message, else as a block
        before its content.

    Raises:
      BadRow: calls and results do not match, or an answer is empty.
    """
    messages = [
        _message(item, bool(tools), thinking) if isinstance(item, Answer) else item
        for item in assembled(events, typed=False)
    ]
    first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
    if tools and first is not None:
        question = messages[first]
        messages[first] = replace(question, content=tool_prompt(tools, question.content))
    return messages


def _message(answer: Answer, with_tools: bool, thinking: bool) -> Message:
    """An answer as one message. If its last call has no result, it ends where generation stops."""
    texts = []
    for step in answer.steps:
        thoughts = [*step.thoughts, step.said or ""]
        for call, result in ((made.call, made.result) for made in step.calls):
            texts.append(
                f"Thought: {_thought([*thoughts, call.thought], f'I need to call {call.name}.')}\n"
                f"Action: {call.name}\nAction Input: {call.arguments}\n"
                f"Observation:{'' if result is None else f' {_inside(result.strip())}'}"
            )
            thoughts = []
    calls_tools, last = bool(texts), answer.steps[-1]
    said, thought = last.said or "", "\n\n".join(last.thoughts)
    if last.calls:
        pass
    elif calls_tools or (with_tools and thought):
        thought = _thought(last.thoughts, LAST_THOUGHT)
        texts.append(f"Thought: {thought}\nFinal Answer: {_inside(said)}")
    elif thinking:
        return message("assistant", said, answer.weight, thinking=thought)
    else:
        texts.append(with_think_block(thought, said) if thought else said)
    return message("assistant", "\n".join(texts), answer.weight, trajectory=calls_tools)


def _thought(texts: Sequence[str], otherwise: str) -> str:
    """The thoughts before a call or an answer, or `otherwise` if there are none."""
    plain = [text.strip().removeprefix("Thought:").strip() for text in texts]
    return _inside("\n\n".join(filter(None, plain))) or otherwise


def _inside(text: str) -> str:
    """The text, changed so that no line begins with one of the words that structure a turn."""
    return MARK.sub("\n ", text)

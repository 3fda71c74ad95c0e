"""Answers: the text that a model has written as a message with its thinking and its calls."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from moi_jax.text.conversations import Message, ToolCall
from moi_jax.text.jinja.call_probe import call_form
from moi_jax.text.jinja.call_syntax import Types
from moi_jax.text.jinja.chat import THINK, THOUGHT, inline_thinking
from moi_jax.text.jinja.template import QUESTION, JinjaTemplate
from moi_jax.text.templates import Template

Json = dict[str, Any]


def read_answer(
    text: str, template: Template, tools: Sequence[str] = (), thinking: bool | None = None
) -> Message:
    """An assistant's message from the text that a model has written.

    Args:
      template: in which the model writes.
      tools: that the prompt has listed, see `Conversation`. Their schemas tell the types of
        arguments where the template does not write them. Without tools, no calls are looked for.
      thinking: with which the prompt was rendered, see `render_prompt`.

    Returns:
      A template of ours has neither thinking nor calls: all is content. So is a call that cannot
      be read. Text after the calls stands behind the text before them.
    """
    if not isinstance(template, JinjaTemplate):
        return Message("assistant", text)
    thought, content = split_thinking(text, begins_thought(template, thinking))
    form = call_form(template) if tools else None
    calls: tuple[ToolCall, ...] = ()
    if form:
        names = {json.loads(tool)["function"]["name"] for tool in tools}
        content, calls = form.read(content, argument_types(tools), names)
    return Message("assistant", content, thinking=thought, calls=calls)


def split_thinking(text: str, begun: bool = False) -> tuple[str, str]:
    """The thought at the front of an answer, and the rest.

    Args:
      begun: the prompt has begun a thought. An answer that does not end it has none.
    """
    before, ended, after = text.partition(THOUGHT)
    own = before.lstrip().startswith(THINK)
    if not (own or (begun and ended)):
        return "", text
    return before.lstrip().removeprefix(THINK).strip("\n"), after.lstrip("\n")


@lru_cache(maxsize=8)
def begins_thought(template: JinjaTemplate, thinking: bool | None) -> bool:
    """Whether the template's prompts end within a thought, which the answer goes on with."""
    prompt = template.chat_text((QUESTION,), generate=True, thinking=thinking)
    return prompt.rstrip().endswith(THINK)


def argument_types(tools: Sequence[str]) -> Types:
    """The types of arguments by (tool, argument), as the tools' JSON schemas tell them."""
    types: dict[tuple[str, str], str] = {}
    for tool in tools:
        function = json.loads(tool).get("function", {})
        properties = (function.get("parameters") or {}).get("properties", {})
        for name, schema in properties.items():
            kind = schema.get("type") if isinstance(schema, dict) else None
            if isinstance(kind, str):
                types[function["name"], name] = kind
    return types


def call_objects(calls: Sequence[ToolCall]) -> list[Json]:
    """Calls as JSON objects with the keys name and arguments."""
    return [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]


def answer_lines(
    text: str, template: Template, tools: Sequence[str], thinking: bool | None = None
) -> str:
    """An answer for people: its text, then each call as a line of JSON."""
    answer = read_answer(text, template, tools, thinking)
    if not answer.calls:
        return text
    written = inline_thinking(answer) if answer.thinking else answer.content
    calls = [json.dumps(call, ensure_ascii=False) for call in call_objects(answer.calls)]
    return "\n".join([*([written.rstrip()] if written.strip() else []), *calls])


def message_object(message: Message) -> Json:
    """The message in OpenAI's form, as rows of the format `messages` have it."""
    calls = [
        {
            **({"id": call.id} if call.id else {}),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.calls
    ]
    return {
        "role": message.role,
        "content": message.content,
        **({"reasoning_content": message.thinking} if message.thinking else {}),
        **({"tool_calls": calls} if calls else {}),
    }

"""Renders conversations and prompts by a checkpoint's own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.fixed_rendering import span_weights
from moi_jax.text.instructions import (
    ASSISTANT,
    QWEN_OFFICIAL,
    Instruction,
    Rendering,
    Thinking,
    observed,
    system_text,
)
from moi_jax.text.jinja.chat import normalized
from moi_jax.text.jinja.samples import Sample, Sampler, Span, unmaskable
from moi_jax.text.jinja.template import JinjaTemplate

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer

DEFAULTS = tuple(
    (field.name, field.default) for field in fields(Message) if field.default is not MISSING
)
# Stands for the special tokens in a user's text, which are not the template's.
MASK = "\uf8e2"


@lru_cache(maxsize=8)
def sampler(template: JinjaTemplate, options: Rendering) -> Sampler:
    """The sampler of a template, which remembers the shapes that it has seen."""
    return Sampler(template, options.thinking, options.rewritten_history)


def render(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    prompt: str | None,
    row_system: str,
    options: Rendering,
) -> list[list[Instruction] | BadRow]:
    """The samples of each conversation, see `text.rendering.render`."""
    make = sampler(template, options).samples
    rendered: list[list[tuple[Conversation, Sample]] | BadRow] = []
    spans: list[list[tuple[int, int, float]]] = []
    for conversation in conversations:
        whole = _under(conversation, tokenizer, prompt, row_system)
        try:
            pairs = [(whole, _checked(sample, tokenizer)) for sample in make(whole)]
            spans += [_label_spans(*pair) for pair in pairs]
            rendered.append(pairs)
        except BadRow as bad:
            rendered.append(bad)
    samples = [pair for found in rendered if not isinstance(found, BadRow) for pair in found]
    encoded = iter(
        zip(
            samples,
            spans,
            tokenizer.encode_rendered(
                [sample.text for _, sample in samples],
                [[(start, end) for start, end, _ in wanted] for wanted in spans],
            ),
            strict=True,
        )
    )
    return [
        found
        if isinstance(found, BadRow)
        else [_instruction(conversation, options, *next(encoded)) for _ in found]
        for conversation, found in zip(conversations, rendered, strict=True)
    ]


def _under(
    conversation: Conversation, tokenizer: Tokenizer, prompt: str | None, row_system: str
) -> Conversation:
    """The conversation with its system turn, in the tokenizer's normal form."""
    system = system_text(prompt, conversation.system or "", row_system)
    head = () if system is None else (Message("system", system),)
    whole = replace(conversation, messages=(*head, *conversation.turns))
    return normalized(whole, tokenizer.normalize)


def _checked(sample: Sample, tokenizer: Tokenizer) -> Sample:
    if tokenizer.normalize(sample.text) != sample.text:
        raise BadRow("not_normal", "a text begins with a mark that joins the letter before it")
    return sample


def _label_spans(conversation: Conversation, sample: Sample) -> list[tuple[int, int, float]]:
    """(start, end, weight) of what is trained on: characters of the sample's text."""
    found = []
    for span in sample.spans:
        message = conversation.messages[span.turn]
        found += [(*part, message.weight) for part in _written(message, span, sample.text)]
    return found


def _written(message: Message, span: Span, text: str) -> list[tuple[int, int]]:
    """The parts of a span that the model writes: a trajectory holds what tools have written."""
    if not message.trajectory:
        return [(span.start, span.end)]
    begin = text.find(message.content, span.start, span.end)
    if begin < 0:
        raise unmaskable(span.turn, "it does not hold the text of the trajectory as it is")
    borders = [span.start]
    for start, end in observed(message.content):
        borders += [begin + start, begin + end]
    return list(zip(borders[::2], [*borders[1::2], span.end], strict=True))


def _instruction(
    conversation: Conversation,
    options: Rendering,
    rendered: tuple[Conversation, Sample],
    labels: Sequence[tuple[int, int, float]],
    encoded: tuple[list[int], list[tuple[int, int]]],
) -> Instruction:
    ids, ranges = encoded
    spans, end_before = [], 1  # token 0 has no token before it that could predict it
    for start, end in ranges:
        spans.append((max(start, end_before), end, ASSISTANT | QWEN_OFFICIAL))
        end_before = end
    return Instruction(
        np.array(ids, np.int32),
        0,
        np.array(spans, np.int32).reshape(-1, 3),
        conversation.system or "",
        span_weights([weight for _, _, weight in labels]),
        to_json(_of_sample(conversation, rendered), options.thinking),
    )


def _of_sample(conversation: Conversation, rendered: tuple[Conversation, Sample]) -> Conversation:
    """The conversation as it was before the domain's prompt, with only what the sample trains."""
    whole, sample = rendered
    added = len(whole.messages) - len(conversation.messages)  # a system turn of the domain
    trained = {span.turn - added for span in sample.spans}
    messages = tuple(
        replace(message, train=number in trained) if message.role == "assistant" else message
        for number, message in enumerate(conversation.messages[: sample.messages - added])
    )
    return replace(conversation, messages=messages)


def to_json(conversation: Conversation, thinking: Thinking) -> str:
    """A sample's conversation, and data.thinking, as JSON without values that are the default."""
    messages = [_values(message) for message in conversation.messages]
    whole = {"messages": messages, "tools": conversation.tools, "thinking": thinking}
    return json.dumps(whole, ensure_ascii=False)


def _values(message: Message) -> dict[str, Any]:
    """The role and content of a message, and what is not as in a plain one."""
    found = {"role": message.role, "content": message.content}
    return found | {
        name: value for name, plain in DEFAULTS if (value := getattr(message, name)) != plain
    }


def from_json(text: str) -> tuple[Conversation, Thinking]:
    """What `to_json` wrote."""
    whole = json.loads(text)
    messages = tuple(_message(values) for values in whole["messages"])
    return Conversation(messages, tuple(whole["tools"])), whole["thinking"]


def _message(values: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(*call) for call in values.pop("calls", ()))
    return Message(**values, calls=calls)


def with_system_prompt(
    instruction: Instruction,
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    prompt: str | None,
    row_system: str,
) -> Instruction:
    """The same turns under another system prompt, see `text.rendering.with_system_prompt`."""
    conversation, thinking = from_json(instruction.conversation)
    options = Rendering(thinking, rewritten_history="last")  # it is one sample already
    (found,) = render([conversation], tokenizer, template, prompt, row_system, options)
    if isinstance(found, BadRow):
        raise found
    return found[0]


def first_exchanges(
    instruction: Instruction,
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    prompt: str | None,
    row_system: str,
    limit: int,
) -> tuple[Instruction, int]:
    """The first exchanges that fit the limit, see `text.rendering.first_exchanges`."""
    conversation, thinking = from_json(instruction.conversation)
    count = sum(message.role == "user" for message in conversation.messages)
    options = Rendering(thinking, rewritten_history="refuse")
    for fewer in range(count - 1, 0, -1):
        shorter = conversation.first_exchanges(fewer)
        (found,) = render([shorter], tokenizer, template, prompt, row_system, options)
        if not isinstance(found, BadRow) and len(found[0].tokens) <= limit:
            return found[0], fewer
    return instruction, 0


def render_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    prompt: str | None,
    tools: Sequence[str],
    thinking: bool | None,
) -> list[int]:
    """The tokens of a chat up to where the model answers, see `text.rendering.render_prompt`."""
    whole = _under(Conversation(tuple(messages), tuple(tools)), tokenizer, prompt, "keep")
    masked: list[str] = []

    def mask(text: str) -> str:
        masked.extend(template.specials.findall(text))
        return template.specials.sub(MASK, text)

    shown = [replace(message, content=mask(message.content)) for message in whole.messages]
    text = template.chat_text(shown, whole.tools, generate=True, thinking=thinking)
    pieces = text.split(MASK)
    if len(pieces) != len(masked) + 1:
        raise BadRow("control_tokens", "the chat template moves the text of a message")
    ids: list[int] = []
    for piece, token in zip(pieces, [*masked, ""], strict=True):
        ids += tokenizer.encode_rendered([piece], [[]])[0][0]
        ids += tokenizer.encode(token) if token else []  # as text
    return ids

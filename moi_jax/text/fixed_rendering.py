r"""Renders conversations and prompts in a chat template of ours.

In ChatML, the conversation (user: "2 + 2?", assistant: "4") under the prompt "Be brief." becomes

    <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n
    <|im_start|>assistant\n4<|im_end|>\n

and `4<|im_end|>` carries loss (loss.targets: assistant). The tokenizer's chat template gives the
text around the contents. Roles, fixed text and contents are encoded separately. In ChatML, tokens
and labels are those of Qwen's official fine-tuning code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moi_jax.text.conversations import Conversation, Message
from moi_jax.text.instructions import (
    ASSISTANT,
    QWEN_OFFICIAL,
    Instruction,
    Span,
    observed,
    system_text,
)
from moi_jax.text.templates import FixedTemplate

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer


def _head(template: FixedTemplate, system: list[int] | None) -> tuple[list[int], list[Span]]:
    """Tokens and spans before the first turn; the span includes the token that begins the turn."""
    if system is None:
        return list(template.opening), []
    tokens = [*template.opening, *template.headers["system"], *system, *template.footer]
    return tokens, [(len(tokens) - len(template.footer), len(tokens) + 1, QWEN_OFFICIAL)]


def render(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: FixedTemplate,
    prompt: str | None,
    row_system: str,
) -> list[Instruction]:
    """Renders conversations as instructions under one domain's system prompt.

    Args:
      conversations: any number; the tokenizer encodes them as one batch.
      prompt: the system prompt; None means no system block, except for a row's own system text.
      row_system: data.row_system, which decides about a row's own system text.
    """
    systems = [system_text(prompt, c.system or "", row_system) for c in conversations]
    distinct = list({text for text in systems if text is not None})
    contents = [message.content for c in conversations for message in c.turns]
    texts = [template.text(content) for content in (*distinct, *contents)]
    encoded = iter(tokenizer.encode_batch(texts))
    system_ids: dict[str | None, list[int] | None] = {None: None}
    system_ids.update((text, next(encoded)) for text in distinct)
    instructions = []
    for conversation, system in zip(conversations, systems, strict=True):
        tokens, spans = _head(template, system_ids[system])
        system_length = len(tokens)
        weights = [1.0] * len(spans)
        for number, message in enumerate(conversation.turns):
            # The fixed text around an answer that is not trained on is not trained on either.
            labels = message.role != "assistant" or message.train
            if number and labels:
                spans.append((len(tokens), len(tokens) + 1, QWEN_OFFICIAL))
                weights.append(1.0)
            tokens += template.headers[message.role]
            start = len(tokens)
            tokens += next(encoded)
            end = len(tokens)
            tokens += template.footer
            if message.role == "assistant" and message.train:
                end += 1
                spans += _answer_spans(message, start, end, tokenizer, template)
            weights += [message.weight] * (len(spans) - len(weights))
            if labels and end < len(tokens):
                spans.append((end, len(tokens), QWEN_OFFICIAL))
                weights.append(1.0)
        instructions.append(
            Instruction(
                np.array(tokens, np.int32),
                system_length,
                np.array(spans, np.int32),
                conversation.system or "",
                span_weights(weights),
            )
        )
    return instructions


def span_weights(weights: Sequence[float]) -> np.ndarray | None:
    """The weights of spans for an `Instruction`."""
    return None if all(weight == 1 for weight in weights) else np.array(weights, np.float32)


def _answer_spans(
    message: Message, start: int, end: int, tokenizer: Tokenizer, template: FixedTemplate
) -> list[Span]:
    """The spans of an answer at tokens [start, end), which include the token that ends the turn."""
    both = ASSISTANT | QWEN_OFFICIAL
    if not message.trajectory:
        return [(start, end, both)]
    content = template.text(message.content)
    begins = np.array([begin for begin, _ in tokenizer.encode_with_offsets(content)[1]])
    spans: list[Span] = []
    written = start  # up to here the spans are complete
    for by_tool in observed(tokenizer.normalize(content)):
        first, last = (start + np.searchsorted(begins, by_tool)).tolist()
        spans += [(written, first, both), (first, last, QWEN_OFFICIAL)]
        written = last
    return [*spans, (written, end, both)]


def with_system_prompt(
    instruction: Instruction,
    tokenizer: Tokenizer,
    template: FixedTemplate,
    prompt: str | None,
    row_system: str,
) -> Instruction:
    """The same turns under another system prompt, as `render` gives them for that prompt."""
    text = system_text(prompt, instruction.row_system, row_system)
    content = None if text is None else tokenizer.encode(template.text(text))
    head, head_spans = _head(template, content)
    # The span of the system block includes the token that begins the first turn, so no span
    # begins or ends at the border.
    of_turns = instruction.spans[:, 0] > instruction.system_length
    spans, weights = instruction.spans[of_turns], instruction.weights
    spans = spans + np.array([len(head) - instruction.system_length] * 2 + [0], np.int32)
    return replace(
        instruction,
        tokens=np.concatenate(
            [np.array(head, np.int32), instruction.tokens[instruction.system_length :]]
        ),
        system_length=len(head),
        spans=np.concatenate([np.array(head_spans, np.int32).reshape(-1, 3), spans]),
        weights=None
        if weights is None
        else np.concatenate([np.ones(len(head_spans), np.float32), weights[of_turns]]),
    )


def first_exchanges(
    instruction: Instruction, template: FixedTemplate, limit: int
) -> tuple[Instruction, int]:
    """Drops exchanges (a user and an assistant turn) from the end until the rest fits `limit`.

    Args:
      limit: tokens.

    Returns:
      The shorter instruction and the number of its exchanges; 0 if not even one fits.
    """
    tokens, system_length = instruction.tokens, instruction.system_length
    # This token never comes from text, so it marks the turns; every second one begins an exchange.
    turns = system_length + np.flatnonzero(tokens[system_length:] == template.turn)
    ends = np.append(turns[2::2], len(tokens))
    count = int(np.searchsorted(ends, limit, side="right"))
    end = int(ends[count - 1]) if count else system_length
    kept = instruction.spans[:, 0] < end
    weights = None if instruction.weights is None else instruction.weights[kept]
    shorter = replace(
        instruction, tokens=tokens[:end], spans=instruction.spans[kept], weights=weights
    )
    return shorter, count


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: FixedTemplate, prompt: str | None
) -> list[int]:
    """The tokens of a chat whose last message is the user's, up to where the model answers.

    Args:
      messages: a system message at the front replaces `prompt`.
      prompt: the system prompt; None means no system block.
    """
    if messages[0].role == "system":
        prompt, messages = messages[0].content, messages[1:]
    system = None if prompt is None else tokenizer.encode(template.text(prompt))
    tokens, _ = _head(template, system)
    for message in messages:
        tokens += template.headers[message.role]
        tokens += tokenizer.encode(template.text(message.content)) + template.footer
    return tokens + template.headers["assistant"]

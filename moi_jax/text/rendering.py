"""Rendering: conversations as tokens with their loss spans, and inference prompts.

The chat template of the tokenizer decides how: a template of ours (fixed_rendering.py) or the
checkpoint's own (jinja/). A conversation is rendered by the faster template of ours also where the
checkpoint's own is known to write the same tokens.
"""

from collections.abc import Sequence
from itertools import compress

from moi_jax.common.errors import UserError
from moi_jax.text import fixed_rendering
from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.instructions import Instruction, Rendering
from moi_jax.text.jinja import rendering as jinja_rendering
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.templates import FixedTemplate, Template
from moi_jax.text.tokenizer import Tokenizer

AS_AT_INFERENCE = Rendering()


def render(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    prompt: str | None,
    row_system: str,
    options: Rendering = AS_AT_INFERENCE,
) -> list[list[Instruction] | BadRow]:
    """Renders conversations as instructions under one domain's system prompt.

    Args:
      conversations: any number; the tokenizer encodes them as one batch.
      prompt: the system prompt; None means no system block, except for a row's own system text.
      row_system: data.row_system, which decides about a row's own system text.

    Returns:
      For each conversation its samples, in the order of their turns, or why it has none. It has
      several where the template rewrites its history.
    """
    template = tokenizer.template
    if isinstance(template, FixedTemplate):
        made = fixed_rendering.render(conversations, tokenizer, template, prompt, row_system)
        return [[instruction] for instruction in made]
    own = _own(template)
    plain = [own.is_plain(conversation, prompt) for conversation in conversations]
    fixed: list[Instruction] = []
    if own.equal:
        chosen = list(compress(conversations, plain))
        fixed = fixed_rendering.render(chosen, tokenizer, own.equal, prompt, row_system)
    others = [c for c, is_plain in zip(conversations, plain, strict=True) if not is_plain]
    by_jinja = iter(jinja_rendering.render(others, tokenizer, own, prompt, row_system, options))
    by_us = iter(fixed)
    return [[next(by_us)] if is_plain else next(by_jinja) for is_plain in plain]


def _own(template: Template) -> JinjaTemplate:
    assert isinstance(template, JinjaTemplate)  # there is no third kind
    return template


def _fixed(instruction: Instruction, template: Template) -> FixedTemplate | None:
    """The template of ours that rendered the instruction; None if it was the checkpoint's own."""
    if isinstance(template, FixedTemplate):
        return template
    return None if instruction.conversation else _own(template).equal


def with_system_prompt(
    instruction: Instruction, tokenizer: Tokenizer, prompt: str | None, row_system: str
) -> Instruction:
    """The same turns under another system prompt, as `render` gives them for that prompt.

    Raises:
      UserError: the template refuses the prompt.
    """
    template = tokenizer.template
    if fixed := _fixed(instruction, template):
        return fixed_rendering.with_system_prompt(instruction, tokenizer, fixed, prompt, row_system)
    try:
        return jinja_rendering.with_system_prompt(
            instruction, tokenizer, _own(template), prompt, row_system
        )
    except BadRow as bad:
        raise UserError(bad.detail) from None


def first_exchanges(
    conversation: Conversation,
    instruction: Instruction,
    tokenizer: Tokenizer,
    prompt: str | None,
    row_system: str,
    limit: int,
    options: Rendering = AS_AT_INFERENCE,
) -> tuple[Instruction, int]:
    """Drops exchanges from the end until the rest fits `limit`.

    An exchange is a user's turn and all that follows before the next one.

    Args:
      instruction: the only sample of the conversation.
      prompt, row_system, options: with which it was rendered.
      limit: tokens.

    Returns:
      The shorter instruction and the number of its exchanges; 0 if not even one fits.
    """
    template = tokenizer.template
    if fixed := _fixed(instruction, template):
        return fixed_rendering.first_exchanges(instruction, fixed, limit)
    return jinja_rendering.first_exchanges(
        conversation, instruction, tokenizer, _own(template), prompt, row_system, options, limit
    )


def _check_abilities(template: Template, tools: Sequence[str], thinking: bool | None) -> None:
    """Refuses a prompt with tools, or a choice of thinking, that the template has no form for."""
    if tools and not template.renders_tools:
        raise UserError(
            f"the chat template {template.name} has no form for tools; use a checkpoint whose own "
            f"template has one, or name such a template"
        )
    if thinking is not None and not template.chooses_thinking:
        raise UserError(
            f"the chat template {template.name} writes the same prompt with thinking and without; "
            f"leave the choice out"
        )


def render_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    prompt: str | None,
    tools: Sequence[str] = (),
    thinking: bool | None = None,
) -> list[int]:
    """The tokens of a chat whose last message is not the assistant's, up to where it answers.

    Args:
      messages: a system message at the front replaces `prompt`.
      prompt: the system prompt; None means no system block.
      tools: descriptions of the tools that may be called, see `Conversation`.
      thinking: whether a model that can do both shall think; None is the template's default.

    Raises:
      UserError: the template refuses the chat, or has no form for tools or no choice of thinking.
    """
    template = tokenizer.template
    _check_abilities(template, tools, thinking)
    if isinstance(template, FixedTemplate):
        return fixed_rendering.render_prompt(messages, tokenizer, template, prompt)
    try:
        return jinja_rendering.render_prompt(
            messages, tokenizer, _own(template), prompt, tools, thinking
        )
    except BadRow as bad:
        raise UserError(bad.detail) from None

"""Compares a checkpoint's own chat template with one of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.fixed_rendering import render, render_prompt
from moi_jax.text.instructions import Rendering, label_mask
from moi_jax.text.jinja.chat import shared_length
from moi_jax.text.jinja.rendering import render as render_own
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.templates import FixedTemplate

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer

QUESTION = Message("user", "What is 2 + 2?")
# The chats on which templates are compared: with and without a system turn; with a user turn last
# (an inference prompt) or an assistant turn last (a training row); with text a template may change.
CHATS: tuple[tuple[Message, ...], ...] = (
    (QUESTION,),
    (Message("system", "Be brief."), QUESTION),
    (QUESTION, Message("assistant", "It is 4.")),
    (Message("system", "Be brief."), QUESTION, Message("assistant", "4")),
    (QUESTION, Message("assistant", "It is 4."), Message("user", "And 3 + 3?")),
    (
        Message("system", "Two lines,\nwith space around. \n"),
        Message("user", "def f(x):\n\treturn {{ x }} {% if %} <b>'\"\\</b>\n\n"),
        Message("assistant", "Grüße, 世界 \U0001f600\n"),
        Message("user", "Go on. "),
        Message("assistant", "Thought: x\nObservation: y"),
    ),
)
# Where white space meets the template's own, and thinking in the text: the texts are compared, but
# the tokens may differ.
SPACED: tuple[Message, ...] = (
    Message("system", " Two lines,\nwith space around. \n"),
    Message("user", "\n  def f(x):\n\treturn x\n\n"),
    Message("assistant", " Grüße, 世界 \U0001f600\n"),
    Message("user", "Go on. "),
    Message("assistant", "<think>\nhm\n</think>\n\nThought: x\nObservation: y"),
)
EXCERPT = 40  # characters shown on either side of a difference


def difference(own: JinjaTemplate, ours: FixedTemplate, tokenizer: Tokenizer) -> str | None:
    """The first difference between the templates on plain chats, in one line; None if none.

    A template's own default prompt is none: ours gets it as the system prompt.
    """
    if not own.takes_system:
        return "its own template has no place for a system prompt"
    for chat in CHATS:
        try:
            text = _text(own, chat)
        except BadRow as bad:
            return bad.detail
        ids = _ours(chat, tokenizer, ours, own.default_prompt)
        if tokenizer.encode_rendered([tokenizer.normalize(text)], [[]])[0][0] != ids:
            roles = ", ".join(message.role for message in chat)
            return f"for a chat of {roles}, {_where(text, tokenizer.decode(ids))}"
    return None


def is_equal(own: JinjaTemplate, ours: FixedTemplate, tokenizer: Tokenizer) -> bool:
    """Whether ours can stand for a template that has no form for anything but contents."""
    if own.renders_tools or own.style.thinking or difference(own, ours, tokenizer):
        return False
    if own.marks and not _has_same_labels(own, ours, tokenizer):
        return False
    try:
        text = _text(own, SPACED)
    except BadRow:
        return False
    return tokenizer.normalize(text) == tokenizer.decode(_ours(SPACED, tokenizer, ours, None))


def _has_same_labels(own: JinjaTemplate, ours: FixedTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a template marks as the assistant's what ours trains on."""
    chat = [Conversation(CHATS[-1])]
    (mine,) = render(chat, tokenizer, ours, None, "keep")
    (found,) = render_own(chat, tokenizer, own, None, "keep", Rendering())
    if isinstance(found, BadRow) or len(found) > 1:
        return False
    labels, marked = (label_mask(each, "assistant").tolist() for each in (mine, found[0]))
    return labels == marked


def _text(own: JinjaTemplate, chat: Sequence[Message]) -> str:
    if chat[0].role != "system" and own.default_prompt is not None:
        chat = (Message("system", own.default_prompt), *chat)
    return own.chat_text(chat, generate=chat[-1].role == "user")


def _ours(
    chat: Sequence[Message], tokenizer: Tokenizer, ours: FixedTemplate, default: str | None
) -> list[int]:
    """The tokens that we render for a chat: an inference prompt or a training row."""
    if chat[-1].role == "user":
        return render_prompt(chat, tokenizer, ours, default)
    (row,) = render([Conversation(tuple(chat))], tokenizer, ours, default, "keep")
    return row.tokens.tolist()


def _where(theirs: str, ours: str) -> str:
    same = shared_length(theirs, ours)
    shown = slice(max(0, same - EXCERPT), same + EXCERPT)
    return f"its own template renders {theirs[shown]!r} where ours renders {ours[shown]!r}"

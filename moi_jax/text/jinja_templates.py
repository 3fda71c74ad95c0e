"""Chat templates in Jinja: compares a checkpoint's own with ours, and writes ours out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moi_jax.common.errors import UserError
from moi_jax.text.conversations import Conversation, Message
from moi_jax.text.rendering import render, render_prompt
from moi_jax.text.templates import ROLE, TEMPLATES
from moi_jax.text.tokenizer import Tokenizer
from moi_jax.text.vocabulary_files import NAMED, read_object, token_text

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
        Message("system", " Two lines,\nwith space around. \n"),
        Message("user", "\n  def f(x):\n\treturn {{ x }} {% if %} <b>'\"\\</b>\n\n"),
        Message("assistant", " Grüße, 世界 \U0001f600\n"),
        Message("user", "Go on. "),
        Message("assistant", "<think>\nhm\n</think>\n\nThought: x\nObservation: y"),
    ),
)
MARK = "DEFAULT_PROMPT"
EXCERPT = 40  # characters shown on either side of a difference


@dataclass(frozen=True)
class TemplateReport:
    """How the chat template of a tokenizer compares with ours.

    Attributes:
      template: the name of our template that equals it, or else is closest; None if the tokenizer
        has the special tokens of none of ours.
      own: whether the checkpoint has a template of its own.
      default_system_prompt: the system text that its own template adds to a chat without a system
        turn; None if it adds none, or if this cannot be told.
      difference: the first difference from ours, in one line; None if all chats are equal.
    """

    template: str | None
    own: bool
    default_system_prompt: str | None = None
    difference: str | None = None


def check_template(files: Mapping[str, str], tokenizer: Tokenizer) -> TemplateReport:
    """Renders fixed chats with the tokenizer's own chat template and with each of ours.

    Args:
      files: name -> text of the tokenizer's files.

    Raises:
      UserError: the tokenizer's settings are damaged.
    """
    names = ("special_tokens_map.json", "tokenizer_config.json")
    settings = {key: value for name in names for key, value in read_object(files, name).items()}
    source = _own_template(files, settings)
    candidates = []
    for name in TEMPLATES:
        try:
            candidates.append(tokenizer.with_template(name))
        except UserError:  # it lacks the special tokens
            continue
    if not candidates:
        return TemplateReport(None, source is not None, difference=_NOT_OURS if source else None)
    if source is None:
        return TemplateReport(candidates[0].template.name, own=False)
    reports = [_compare(source, settings, candidate) for candidate in candidates]
    return min(reports, key=lambda report: report.difference is not None)


_NOT_OURS = f"it has the special tokens of none of {', '.join(TEMPLATES)}"


def _own_template(files: Mapping[str, str], settings: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    found = settings.get("chat_template")
    try:
        if isinstance(found, list):  # several templates, each with a name
            found = {each["name"]: each["template"] for each in found}.get("default")
    except (KeyError, TypeError):
        raise UserError("the chat_template in tokenizer_config.json is damaged") from None
    return found


def _compare(source: str, settings: dict[str, Any], tokenizer: Tokenizer) -> TemplateReport:
    """Compares with one of our templates: the one that `tokenizer` renders with."""
    name = tokenizer.template.name
    try:
        template = _environment().from_string(source)
        theirs = [tokenizer.normalize(_render(template, settings, chat)) for chat in CHATS]
    except Exception as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())
        return TemplateReport(name, True, None, f"its own template cannot be rendered: {reason}")
    default = _default_prompt(theirs[0], tokenizer)
    for chat, text in zip(CHATS, theirs, strict=True):
        ours = _ours(chat, tokenizer, default)
        if ours != text:
            roles = ", ".join(message.role for message in chat)
            return TemplateReport(
                name, True, default, f"for a chat of {roles}, {_where(text, ours)}"
            )
    return TemplateReport(name, True, default)


class _Generation(Extension):
    """{% generation %}: marks the assistant's text; the text itself does not change."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment in which transformers renders chat templates, with a fixed date."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "26 Jul 2024"}
    return environment


def _render(template: jinja2.Template, settings: dict[str, Any], chat: Sequence[Message]) -> str:
    return template.render(
        messages=[{"role": message.role, "content": message.content} for message in chat],
        add_generation_prompt=chat[-1].role == "user",
        tools=None,
        documents=None,
        **{name: token_text(settings.get(name)) or "" for name in NAMED},
    )


def _ours(chat: Sequence[Message], tokenizer: Tokenizer, default: str | None) -> str:
    """The text of the tokens that we render for a chat: an inference prompt or a training row."""
    if chat[-1].role == "user":
        return tokenizer.decode(render_prompt(chat, tokenizer, default))
    (row,) = render([Conversation(tuple(chat))], tokenizer, default, "keep")
    return tokenizer.decode(row.tokens)


def _default_prompt(text: str, tokenizer: Tokenizer) -> str | None:
    """The text in the system block of the rendered QUESTION, if all around it equals ours."""
    before, mark, after = _ours((QUESTION,), tokenizer, MARK).partition(MARK)
    if not (mark and text.startswith(before) and text.endswith(after)):
        return None
    prompt = text[len(before) : len(text) - len(after)]
    return prompt if tokenizer.template.text(prompt) == prompt else None


def _where(theirs: str, ours: str) -> str:
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False))))
    shown = slice(max(0, same - EXCERPT), same + EXCERPT)
    return f"its own template renders {theirs[shown]!r} where ours renders {ours[shown]!r}"


def export_jinja(prompts: Mapping[str, Any]) -> str:
    """A checkpoint's chat template in Jinja; it renders what we render.

    A chat without a system turn gets the saved default prompt.

    Args:
      prompts: of the checkpoint, see `text.prompts.prompts_metadata`.

    Raises:
      UserError: the checkpoint has no chat template of ours.
    """
    if prompts["chat_template"] not in TEMPLATES:
        raise UserError(
            f"there is no chat template {prompts['chat_template']} to export, only "
            f"{' and '.join(TEMPLATES)}"
        )
    template = TEMPLATES[prompts["chat_template"]]
    role = template.HEADER.index(ROLE)
    before, after = "".join(template.HEADER[:role]), "".join(template.HEADER[role + 1 :])
    opening, footer = "".join(template.OPENING), "".join(template.FOOTER)
    parts = [_output(_literal(opening))] if opening else []
    default = prompts["default_system_prompt"]
    if default is not None:
        block = _output(_literal(f"{before}system{after}{template.text(default)}{footer}"))
        parts.append(f"{{%- if messages[0]['role'] != 'system' %}}{block}{{%- endif %}}")
    content = "message['content'] | trim" if template.STRIPS else "message['content']"
    turn = [_literal(before), "message['role']", _literal(after), content, _literal(footer)]
    parts.append(f"{{%- for message in messages %}}{_output(*turn)}{{%- endfor %}}")
    begun = _output(_literal(f"{before}assistant{after}"))
    parts.append(f"{{%- if add_generation_prompt %}}{begun}{{%- endif %}}")
    return "\n".join(parts)


def _literal(text: str) -> str:
    """The text as a Jinja string; Jinja reads JSON's escapes, except those of surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)


def _output(*expressions: str) -> str:
    return "{{- " + " + ".join(expressions) + " -}}"

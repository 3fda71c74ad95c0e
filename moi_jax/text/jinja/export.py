"""Writes the chat template of a checkpoint in Jinja."""

import json

from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.templates import ROLE, FixedTemplate, Template


def jinja_source(template: Template, default: str | None) -> str:
    """A chat template in Jinja; it renders what we render.

    Args:
      default: the system prompt of a chat without a system turn; None for no system block.
    """
    if isinstance(template, JinjaTemplate):
        return own_sources_with_default(template, default)["default"]
    assert isinstance(template, FixedTemplate)
    return _fixed_source(template, default)


def own_sources_with_default(template: JinjaTemplate, default: str | None) -> dict[str, str]:
    """The sources of a checkpoint's own template by name, changed only where `default` asks it.

    Args:
      default: see `jinja_source`. None leaves a default prompt of the template itself.
    """
    if default is None or default == template.default_prompt:
        return dict(template.sources)
    return {name: _with_default(source, default) for name, source in template.sources.items()}


def _with_default(source: str, default: str) -> str:
    """A template with a default prompt in front of it."""
    system = f"[{{'role': 'system', 'content': {_literal(default)}}}]"
    return (
        f"{{%- if not (messages and messages[0]['role'] == 'system') %}}"
        f"{{%- set messages = {system} + messages %}}{{%- endif %}}{source}"
    )


def _fixed_source(template: FixedTemplate, default: str | None) -> str:
    role = template.HEADER.index(ROLE)
    before, after = "".join(template.HEADER[:role]), "".join(template.HEADER[role + 1 :])
    opening, footer = "".join(template.OPENING), "".join(template.FOOTER)
    parts = [_output(_literal(opening))] if opening else []
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

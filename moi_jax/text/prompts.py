"""Prompts: the system prompt of each domain, and what a checkpoint saves about prompts."""

import logging
from typing import Any

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.templates import FROM_CHECKPOINT, TEMPLATES, Template, fixed_fingerprint

log = logging.getLogger(__name__)

Json = dict[str, Any]
MOST_SHOWN = 40  # characters of a prompt in a message


def resolve_prompt(data: config.Data, domain: config.Domain) -> str | None:
    """The system prompt of a domain under data.system_prompts; None means no system block."""
    if data.system_prompts == "none":
        return None
    if data.system_prompts == "default" or domain.prompt is None:
        return data.default_system_prompt
    return domain.prompt


def check_prompts(data: config.Data, template: Template) -> None:
    """Checks that a chat template can write the system prompt of every domain, or none.

    Args:
      data: the section with a resolved default_system_prompt.

    Raises:
      UserError: it cannot; the message names the domain.
    """
    for domain in data.domains:
        prompt = resolve_prompt(data, domain)
        if prompt is not None and not template.takes_system:
            raise UserError(
                f"the tokenizer's chat template has no place for a system prompt, but domain "
                f"{domain.name} has one: {shortened(prompt)!r}; set data.system_prompts: none, or "
                f"name another template with tokenizer.chat_template"
            )
        if prompt is None and not template.omits_system:
            raise UserError(
                f"the tokenizer's chat template always writes a system prompt of its own, but "
                f"domain {domain.name} has none; give it a prompt, or name another template with "
                f"tokenizer.chat_template"
            )


def shortened(prompt: str) -> str:
    """The beginning of a prompt, for messages."""
    return prompt if len(prompt) <= MOST_SHOWN else f"{prompt[:MOST_SHOWN]}..."


def tell_templates(template: Template) -> None:
    """Logs which template renders what, if the tokenizer has several."""
    if isinstance(template, JinjaTemplate) and len(template.sources) > 1:
        known = ", ".join(sorted(template.sources))
        tools = "tool_use" if "tool_use" in template.sources else "default"
        log.info(
            f"the tokenizer has the chat templates {known}: {tools} renders conversations with "
            f"tools, default all others"
        )


def check_targets(targets: str, template: Template) -> None:
    """Raises UserError: the template's instructions have no labels for that loss.targets."""
    if targets != "assistant" and template.name == FROM_CHECKPOINT:
        raise UserError(
            f"loss.targets: {targets} is a rule of the chat templates {' and '.join(TEMPLATES)}, "
            f"but the tokenizer's own is used; set loss.targets: assistant, or name one of them "
            f"with tokenizer.chat_template"
        )


def prompts_metadata(
    default_system_prompt: str | None, template: Template | None, data: config.Data | None = None
) -> Json:
    """The prompts and the chat template of a checkpoint, as its item `prompts` saves them.

        {"default_domain": "chat", "default_system_prompt": "You are kind.",
         "domains": {"chat": "You are kind.", "code": "You are a programmer."},
         "chat_template": "chatml", "template_hash": "5f1c..."}

    Args:
      default_system_prompt: None if a chat without a system turn has no system block.
      template: None if the tokenizer has none.
      data: the section with a resolved default_system_prompt; None before training. Of data.tools
        only `react` is saved.
    """
    domains = {} if data is None else {d.name: resolve_prompt(data, d) for d in data.domains}
    return {
        "default_domain": data.default_domain if data else None,
        "default_system_prompt": default_system_prompt,
        "domains": domains,
        "chat_template": template.name if template else None,
        "template_hash": template.fingerprint() if template else None,
        **({"tools": "react"} if data and data.tools == "react" else {}),
    }


def saved_template(item: Json, where: object, option: str = "tokenizer.chat_template") -> str:
    """The name of the chat template that a checkpoint was made with, see `template_choice`.

    Args:
      item: the checkpoint's prompts, see `prompts_metadata`.
      where: the checkpoint, for messages.
      option: the setting that chooses another template, for messages.

    Raises:
      UserError: it was made with none, or this version renders the template differently.
    """
    name = item["chat_template"]
    if name == FROM_CHECKPOINT:  # its source is among the files of the tokenizer
        return name
    choose = f"choose one with {option}: {' or '.join(TEMPLATES)}"
    if name not in TEMPLATES:
        raise UserError(f"{where} has no chat template of ours (found {name}); {choose}")
    ours = fixed_fingerprint(TEMPLATES[name])
    if item["template_hash"] != ours:
        raise UserError(
            f"{where} was made with another rendering of the chat template {name} (hash "
            f"{str(item['template_hash'])[:16]}, now {ours[:16]}); to use the rendering of this "
            f"version, {choose}"
        )
    return name

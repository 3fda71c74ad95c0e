"""The prompts item of a checkpoint: system prompts and template, with their fingerprints."""

from typing import Any

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.text.templates import TEMPLATES

Json = dict[str, Any]


def resolve_prompt(data: config.Data, domain: config.Domain) -> str | None:
    """The system prompt of a domain under data.system_prompts; None for no system block."""
    if data.system_prompts == "none":
        return None
    if data.system_prompts == "default" or domain.prompt is None:
        return data.default_system_prompt
    return domain.prompt


def prompts_metadata(
    default_system_prompt: str | None, template: str | None, data: config.Data | None = None
) -> Json:
    """Default prompt, the domains' prompts (none before training), template and its hash.

    Args:
      default_system_prompt: None where a chat without a system turn has no system block.
      template: the name of the chat template; None where the tokenizer has that of none.
      data: with its default_system_prompt resolved.
    """
    domains = {} if data is None else {d.name: resolve_prompt(data, d) for d in data.domains}
    return {
        "default_domain": data.default_domain if data else None,
        "default_system_prompt": default_system_prompt,
        "domains": domains,
        "chat_template": template,
        "template_hash": TEMPLATES[template].fingerprint() if template else None,
    }


def saved_template(item: Json, where: object, option: str = "tokenizer.chat_template") -> str:
    """The name of the chat template a checkpoint was made with.

    Args:
      where: names the checkpoint.
      option: what chooses another template instead.

    Raises:
      UserError: it was made with none, or this version renders that template otherwise.
    """
    name = item["chat_template"]
    choose = f"choose by {option}: {' or '.join(TEMPLATES)}"
    if name not in TEMPLATES:
        raise UserError(f"{where} has no chat template of ours (found {name}); {choose}")
    ours = TEMPLATES[name].fingerprint()
    if item["template_hash"] != ours:
        raise UserError(
            f"{where} was made with another rendering of the chat template {name} (hash "
            f"{str(item['template_hash'])[:16]}, now {ours[:16]}); to render it as it is now, "
            f"{choose}"
        )
    return name

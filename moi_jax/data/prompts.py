"""The prompts item of a checkpoint: system prompts and template, with their fingerprints."""

import hashlib
import json
from typing import Any

from moi_jax import config
from moi_jax.data.cache.prepare import resolve_prompt
from moi_jax.data.chatml import RENDERER_VERSION

CHAT_TEMPLATE = "chatml"


def prompts_item(default_system_prompt: str, data: config.Data | None = None) -> dict[str, Any]:
    """Default prompt, the domains' prompts (none before training), template and its hash.

    `data` must have its default_system_prompt resolved.
    """
    domains = {} if data is None else {d.name: resolve_prompt(data, d) for d in data.domains}
    template = f"{CHAT_TEMPLATE}:{RENDERER_VERSION}"
    return {
        "default_domain": data.default_domain if data else None,
        "default_system_prompt": default_system_prompt,
        "domains": domains,
        "chat_template": CHAT_TEMPLATE,
        "template_hash": hashlib.sha256(template.encode()).hexdigest(),
    }


def fingerprint(item: Any) -> str:
    """A short name of a JSON value's content."""
    return hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()[:16]

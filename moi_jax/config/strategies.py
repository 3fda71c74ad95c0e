"""The strategies of `data.strategy`: each one is a preset over the switches of the mixture."""

from typing import Any, Literal

Strategy = Literal["sequence", "packing", "balance", "moi"]

# The presets of docs/method.md. A switch that is set beside `strategy` wins over it.
STRATEGIES: dict[str, dict[str, Any]] = {
    "sequence": {
        "system_prompts": "per_domain",
        "sampling": "proportional",
        "order": "config",
        "mask": "instruction",
        "packing": "none",
    },
    "packing": {
        "system_prompts": "per_domain",
        "sampling": "proportional",
        "order": "shuffled",
        "mask": "row",
        "packing": "sequential",
    },
    "balance": {
        "system_prompts": "per_domain",
        "sampling": "balanced",
        "order": "default_first",
        "mask": "row",
        "packing": "best_fit",
    },
    "moi": {
        "system_prompts": "per_domain",
        "sampling": "balanced",
        "order": "default_first",
        "mask": "chunk",
        "packing": "best_fit",
    },
}

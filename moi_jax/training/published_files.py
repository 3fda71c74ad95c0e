"""What goes out beside exported weights: configuration, tokenizer, chat template, licences."""

import json
from pathlib import Path

from moi_jax.data.jinja_templates import export_jinja
from moi_jax.data.tokenizer import Tokenizer
from moi_jax.models.config import in_family, to_hf_config
from moi_jax.training.checkpoints import ModelItems


def published_files(
    items: ModelItems, as_family: str | None, dtype: str, step: Path
) -> dict[str, str]:
    """Name -> text of all but the weights and the card, of a model read from `step`."""
    name = items.prompts["chat_template"]
    config = {
        **to_hf_config(in_family(items.model, as_family or items.model.family)),
        "torch_dtype": dtype,
        **items.provenance.get("token_ids", {}),
    }
    generation = items.provenance.get("generation_config")
    trained = (step / "config").is_dir()
    if name and (generation is None or trained):
        template = Tokenizer.from_files(items.tokenizer, name).template
        # A base model stops at its own end alone; a trained one has learnt to end its turns.
        ends = list(dict.fromkeys([template.end, template.pad]))
        before = (generation or {}).get("eos_token_id") or []
        before = before if isinstance(before, list) else [before]
        generation = {
            "pad_token_id": template.pad,
            **(generation or {}),
            "eos_token_id": ends + [end for end in before if end not in ends],
        }
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation or {}, indent=2) + "\n",
        **items.tokenizer,
        **({"chat_template.jinja": export_jinja(items.prompts)} if name else {}),
        **items.provenance.get("files", {}),
    }


def where_exact(items: ModelItems) -> str:
    """What the user of a Qwen v1 model by Qwen2's names has to know."""
    if not (items.model.dynamic_ntk or items.model.logn_attention):
        return "as qwen2: exact, this model has neither dynamic NTK nor log-n attention"
    return (
        f"as qwen2: exact up to {items.model.seq_length} tokens; beyond, Qwen v1 has dynamic NTK "
        f"and log-n attention, which Qwen2 has not"
    )

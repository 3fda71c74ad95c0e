"""What goes out beside exported weights: configuration, tokenizer, chat template, licences."""

import json
from pathlib import Path

from moi_jax.data.tokenizer import Tokenizer
from moi_jax.models.config import in_family, to_hf_config
from moi_jax.training.checkpoints import ModelItems


def published_files(
    items: ModelItems, as_family: str | None, dtype: str, step: Path
) -> dict[str, str]:
    """Name -> text of all but the weights and the card, of a model read from `step`."""
    tokenizer = Tokenizer.from_files(items.tokenizer)
    config = {
        **to_hf_config(in_family(items.model, as_family or items.model.family)),
        "torch_dtype": dtype,
        **items.provenance.get("token_ids", {}),
    }
    generation = items.provenance.get("generation_config")
    trained = (step / "config").is_dir()
    if generation is None or trained:
        # A base model stops at its own end alone; a trained one has learnt to end its turns.
        ends = [tokenizer.im_end, tokenizer.endoftext]
        before = (generation or {}).get("eos_token_id") or []
        before = before if isinstance(before, list) else [before]
        generation = {
            "pad_token_id": tokenizer.endoftext,
            **(generation or {}),
            "eos_token_id": ends + [end for end in before if end not in ends],
        }
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **items.tokenizer,
        "chat_template.jinja": _chat_template(items.prompts["default_system_prompt"]),
        **items.provenance.get("files", {}),
    }


def _chat_template(default_system_prompt: str) -> str:
    """ChatML for transformers, which gives a conversation without a system turn the default."""
    default = ""
    if default_system_prompt:
        quoted = json.dumps(default_system_prompt, ensure_ascii=False)
        default = (
            "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n' + "
            + quoted
            + " + '<|im_end|>\\n' }}{% endif %}"
        )
    return (
        default + "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + "
        "message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def where_exact(items: ModelItems) -> str:
    """What the user of a Qwen v1 model by Qwen2's names has to know."""
    if not (items.model.dynamic_ntk or items.model.logn_attention):
        return "as qwen2: exact, this model has neither dynamic NTK nor log-n attention"
    return (
        f"as qwen2: exact up to {items.model.seq_length} tokens; beyond, Qwen v1 has dynamic NTK "
        f"and log-n attention, which Qwen2 has not"
    )

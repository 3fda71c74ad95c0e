"""The files beside exported weights: configuration, tokenizer, chat template, licences."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moi_jax.checkpoints.items import ModelItems
from moi_jax.common.errors import UserError
from moi_jax.models.config import in_family, to_hf_config
from moi_jax.text.jinja.comparison import is_equal
from moi_jax.text.jinja.export import jinja_source, own_sources_with_default
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.template_choice import has_own_template
from moi_jax.text.templates import FixedTemplate, Template
from moi_jax.text.tokenizer import TiktokenTokenizer, Tokenizer
from moi_jax.text.vocabulary_files import read_object

TOKENIZER_CONFIG, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"


def companion_files(
    items: ModelItems, as_family: str | None, dtype: str, step: Path
) -> dict[str, str]:
    """Name -> text of all files except the weights and the card, for a model read from `step`."""
    config = {
        **to_hf_config(in_family(items.model.base, as_family or items.model.family)),
        "torch_dtype": dtype,
        **items.provenance.get("token_ids", {}),
    }
    # What was put together of trained checkpoints is trained, too, though it is no step of a run.
    trained = (step / "config").is_dir() or "combined" in items.provenance
    files = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(_generation(items, trained), indent=2) + "\n",
        **items.tokenizer,
        **items.provenance.get("files", {}),
    }
    if as_family and "qwen.tiktoken" in files:
        files |= _fast_tokenizer(items)
        del files["qwen.tiktoken"]
    # A model that was only converted keeps its own template; that of a trained one has its prompt.
    tokenizer = Tokenizer.from_files(items.tokenizer, items.prompts["chat_template"])
    if items.prompts["chat_template"] and (trained or not has_own_template(tokenizer)):
        default = items.prompts["default_system_prompt"]
        files |= _chat_template(files, _exported_template(tokenizer, default), default)
    return files


def _exported_template(tokenizer: Tokenizer, default: str | None) -> Template:
    """The tokenizer's own template, also where one of ours rendered that writes the same tokens.

    An own template always adds its default prompt, so ours stands for it if there was none.
    """
    template = tokenizer.template
    if not (isinstance(template, FixedTemplate) and has_own_template(tokenizer)):
        return template
    try:
        own = JinjaTemplate(tokenizer)
    except UserError:  # it cannot be used, so ours was named
        return template
    adds = default is None and own.default_prompt is not None
    return own if not adds and is_equal(own, template, tokenizer) else template


def _chat_template(
    files: Mapping[str, str], template: Template, default: str | None
) -> dict[str, str]:
    """The files that hold the chat template: a checkpoint's own stands where it came from."""
    settings = read_object(files, TOKENIZER_CONFIG)
    written = {}
    if isinstance(template, JinjaTemplate) and TEMPLATE_FILE not in files:
        sources = own_sources_with_default(template, default)
        if sources == template.sources:
            return {}
        named = [{"name": name, "template": source} for name, source in sources.items()]
        one = isinstance(settings["chat_template"], str)
        settings["chat_template"] = sources["default"] if one else named
    else:  # the file comes before a template in the settings, which is left out
        written[TEMPLATE_FILE] = jinja_source(template, default)
        if settings.pop("chat_template", None) is None:
            return written
    return {**written, TOKENIZER_CONFIG: json.dumps(settings, ensure_ascii=False, indent=2) + "\n"}


def _fast_tokenizer(items: ModelItems) -> dict[str, str]:
    """The tokenizer of Qwen v1 in the files that readers of Qwen2 expect."""
    tokenizer = Tokenizer.from_files(items.tokenizer, items.prompts["chat_template"])
    assert isinstance(tokenizer, TiktokenTokenizer)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": items.model.seq_length,
    }
    if own := read_object(items.tokenizer, TOKENIZER_CONFIG).get("chat_template"):
        settings["chat_template"] = own
    return {
        "tokenizer.json": tokenizer.to_json(),
        TOKENIZER_CONFIG: json.dumps(settings, indent=2) + "\n",
    }


def _generation(items: ModelItems, trained: bool) -> dict[str, Any]:
    """generation_config.json: the source's; a trained model also stops where its template does."""
    source = items.provenance.get("generation_config")
    name = items.prompts["chat_template"]
    if name is None or (source is not None and not trained):
        return source or {}
    template = Tokenizer.from_files(items.tokenizer, name).template
    before = (source or {}).get("eos_token_id") or []
    before = before if isinstance(before, list) else [before]
    ends = [*template.stops, *(end for end in before if end not in template.stops)]
    return {"pad_token_id": template.pad, **(source or {}), "eos_token_id": ends}


def where_exact(items: ModelItems) -> str:
    """A note on where a Qwen v1 model with the names of Qwen2 is exact."""
    if not (items.model.dynamic_ntk or items.model.logn_attention):
        return "as qwen2: exact, this model has neither dynamic NTK nor log-n attention"
    return (
        f"as qwen2: exact up to {items.model.seq_length} tokens; beyond that Qwen v1 uses dynamic "
        f"NTK and log-n attention, which Qwen2 does not have"
    )

"""Tokenizers for the tests of chat templates."""

import json
from pathlib import Path

from moi_jax.text.tokenizer import Tokenizer

SAMPLES = Path(__file__).parents[2] / "moi_jax" / "data" / "samples"
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>"),
)


def with_specials(*specials: str) -> str:
    """tokenizer.json of the sample set with other special tokens than ChatML's."""
    spec = json.loads((SAMPLES / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    old = spec["added_tokens"]
    for token in old:
        spec["model"]["vocab"].pop(token["content"], None)
    first = min(token["id"] for token in old)
    spec["added_tokens"] = [
        {**old[0], "id": first + n, "content": special} for n, special in enumerate(specials)
    ]
    return json.dumps(spec)


def llama3_tokenizer() -> Tokenizer:
    """The words of the sample set, the special tokens of Llama 3."""
    return Tokenizer.from_files({"tokenizer.json": with_specials(*LLAMA3_SPECIALS)})

"""The tokenizer and the chat template of a model as the metadata of a GGUF file."""

import json
from collections.abc import Mapping
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.text.byte_level import SPLITS
from moi_jax.text.vocabulary_files import read_object

Json = dict[str, Any]


def add_tokenizer(writer: Any, files: Mapping[str, str], rows: int) -> None:
    """Adds what llama.cpp needs to read and write text.

    Args:
      writer: a `gguf.GGUFWriter`.
      files: name -> text of an exported model's files, see `companion_files`.
      rows: of the embedding. Rows without a token get an unused one, as llama.cpp wants one a row.

    Raises:
      UserError: the tokenizer is no byte-level BPE, or llama.cpp has no name for its split.
    """
    from gguf import TokenType

    if "tokenizer.json" not in files:
        raise UserError("the checkpoint has no tokenizer.json, so no GGUF file can be written")
    tokenizer = json.loads(files["tokenizer.json"])
    split = _split_name(tokenizer)
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    numbered = {number: (token, TokenType.NORMAL) for token, number in model["vocab"].items()}
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        numbered[token["id"]] = (token["content"], kind)
    filled = [numbered.get(row, (f"[PAD{row}]", TokenType.UNUSED)) for row in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    _add_special(writer, files, {token: row for row, (token, _) in enumerate(filled)})
    writer.add_add_bos_token(_begins_with_bos(tokenizer))
    settings = read_object(files, "tokenizer_config.json")
    if template := files.get("chat_template.jinja") or settings.get("chat_template"):
        writer.add_chat_template(template)


def _add_special(writer: Any, files: Mapping[str, str], rows: Mapping[str, int]) -> None:
    """Adds the ids of bos, eos, padding and unknown; generation ends at the model's own eos."""
    settings = read_object(files, "tokenizer_config.json")
    generation = read_object(files, "generation_config.json")

    def row(name: str) -> int | None:
        token = settings.get(f"{name}_token") or ""
        return rows.get(token["content"] if isinstance(token, dict) else token)

    ends = generation.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    found = {
        "bos": row("bos"),
        "eos": end if isinstance(end, int) else row("eos"),
        "pad": row("pad"),
        "unk": row("unk"),
    }
    for name, number in found.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)


def _split_name(tokenizer: Json) -> str:
    """llama.cpp's name of how text is split before BPE (tokenizer.ggml.pre)."""
    whole = tokenizer["model"].get("ignore_merges", False)
    found = _steps(tokenizer.get("pre_tokenizer") or {})
    byte_fallback = tokenizer["model"].get("byte_fallback", False)
    # llama.cpp composes no characters (NFC), with Qwen's tokenizer neither.
    normalizer = (tokenizer.get("normalizer") or {"type": "NFC"})["type"]
    if tokenizer["model"].get("type") == "BPE" and not byte_fallback and normalizer == "NFC":
        for name, split in SPLITS.items():
            if found == [_plain(step) for step in split.steps] and whole == split.whole:
                return name
    raise UserError(
        f"the tokenizer splits text in a way that has no name here in GGUF (byte-level BPE with "
        f"{', '.join(SPLITS)} has); export safetensors, and convert these with llama.cpp"
    )


def _steps(pre_tokenizer: Json) -> list[Json]:
    return [_plain(step) for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]


def _plain(step: Json) -> Json:
    """A step without what changes offsets alone."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _begins_with_bos(tokenizer: Json) -> bool:
    """Whether the tokenizer puts a special token before every text."""
    processor = tokenizer.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    return any("SpecialToken" in step["single"][0] for step in steps if step.get("single"))

"""Builds the tokenizer.json of a byte-level BPE: vocabulary, merges, split, added tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Qwen's: one digit at a time. It is also the split of Qwen v1.
QWEN_PATTERN = rf"{_WORDS}|\p{{N}}{_REST}"
# Llama 3's: up to three digits.
LLAMA3_PATTERN = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"


@dataclass(frozen=True)
class Split:
    """How text is split into the pieces that BPE works on, in the terms of tokenizer.json.

    Attributes:
      steps: the pre-tokenizers; ByteLevel is the last.
      normalizer: applied before the split.
      whole: a piece that is in the vocabulary is one token, whatever the merges say.
    """

    steps: tuple[Json, ...]
    normalizer: Json | None = None
    whole: bool = False


def _byte_level(split: bool) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split,  # by GPT-2's pattern
    }


def _by_pattern(pattern: str) -> tuple[Json, ...]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return ({**split, "invert": False}, _byte_level(False))


# By their names in GGUF files (tokenizer.ggml.pre).
SPLITS = {
    "gpt-2": Split((_byte_level(True),)),
    "qwen2": Split(_by_pattern(QWEN_PATTERN), normalizer={"type": "NFC"}),
    "llama-bpe": Split(_by_pattern(LLAMA3_PATTERN), whole=True),
    "smollm": Split(({"type": "Digits", "individual_digits": True}, _byte_level(True))),
}


def tokenizer_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    split: Split,
    added: Mapping[str, tuple[int, bool]],
    bos: str | None = None,
) -> str:
    """The text of tokenizer.json.

    Args:
      vocabulary: byte-level token -> id.
      merges: in the order of their ranks.
      added: token -> (id, whether it is special), for tokens outside the BPE.
      bos: the special token that other readers of the file put before every text.
    """
    added_tokens = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": special,
        }
        for token, (number, special) in sorted(added.items(), key=lambda item: item[1])
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": split.whole, "vocab": dict(vocabulary), "merges": list(merges),
    }  # fmt: skip
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added_tokens,
        "normalizer": split.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(split.steps)},
        "post_processor": _before_every_text(bos, added[bos][0]) if bos else None,
        "decoder": _byte_level(True),
        "model": model,
    }  # fmt: skip
    return json.dumps(whole, ensure_ascii=False)


def _before_every_text(bos: str, number: int) -> Json:
    def of(text: str, type_id: int) -> list[Json]:
        token = {"SpecialToken": {"id": bos, "type_id": type_id}}
        return [token, {"Sequence": {"id": text, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": of("A", 0),
        "pair": [*of("A", 0), *of("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }

"""Builds tokenizer.json from older files: vocab.json with merges.txt, or qwen.tiktoken."""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.text.byte_level import SPLITS, tokenizer_json

# The files do not say how text is split; the class named in tokenizer_config.json does.
SPLIT_OF_CLASS = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
# A token such as <|endoftext|>, which no merge makes; the settings need not list it.
SPECIAL = re.compile(r"<\|.+\|>")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def from_vocabulary_files(files: Mapping[str, str]) -> str:
    """The text of the tokenizer.json that equals a vocab.json with merges.txt.

    Args:
      files: name -> text.

    Raises:
      UserError: a file is missing or damaged, ids have gaps, or the split is not known.
    """
    if "merges.txt" not in files:
        raise UserError("merges.txt is missing beside vocab.json; copy it there")
    vocabulary = read_object(files, "vocab.json")
    if not all(type(number) is int for number in vocabulary.values()):
        raise UserError("vocab.json is not an object of tokens and their ids")
    settings = read_object(files, "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in SPLIT_OF_CLASS:
        raise UserError(
            f"cannot read vocab.json and merges.txt of the tokenizer_class "
            f"{settings.get('tokenizer_class')} in tokenizer_config.json, only of "
            f"{' and '.join(SPLIT_OF_CLASS)}; save the tokenizer as tokenizer.json"
        )
    added = _added(files, settings, vocabulary)
    numbers = {*vocabulary.values(), *(number for number, _ in added.values())}
    if numbers != set(range(len(numbers))):
        raise UserError("the ids of vocab.json and the added tokens have gaps")
    merges = _merges(files["merges.txt"])
    made = {left + right for left, right in merges}
    for token in vocabulary.keys() - made - added.keys():
        if len(token) > 1 and not SPECIAL.fullmatch(token):
            raise UserError(
                f"merges.txt is not a tokenizer's: no merge makes {token!r} of vocab.json, so it "
                f"was cut short or is damaged; copy it again"
            )
    return tokenizer_json(vocabulary, merges, SPLITS[SPLIT_OF_CLASS[kind]], added)


def from_ranks(ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> str:
    """The text of the tokenizer.json that gives the same ids as the ranks of a qwen.tiktoken."""
    shown = _shown_bytes()

    def text(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    in_order = sorted(ranks, key=ranks.__getitem__)
    vocabulary = {text(token): ranks[token] for token in in_order}
    joined = (_last_merge(token, ranks) for token in in_order if len(token) > 1)
    merges = [(text(left), text(right)) for left, right in joined]
    added = {token: (number, True) for token, number in specials.items()}
    return tokenizer_json(vocabulary, merges, SPLITS["qwen2"], added)


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE joins last to make the token; merges follow the result's rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _shown_bytes() -> dict[int, str]:
    """How tokenizer.json writes each byte: printable ones unchanged, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _merges(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    merges = []
    for line in lines:
        left, space, right = line.rstrip("\r").partition(" ")
        if not (left and space and right) or " " in right:
            raise UserError(f"merges.txt is damaged: {line!r} is not a pair of tokens")
        merges.append((left, right))
    return merges


def _added(
    files: Mapping[str, str], settings: dict[str, Any], vocabulary: Mapping[str, int]
) -> dict[str, tuple[int, bool]]:
    """The tokens outside the vocabulary: token -> (id, whether it is special)."""
    added: dict[str, tuple[int, bool]] = {}
    # The newer of the two lists wins; the older one holds special tokens only.
    try:
        for token, number in read_object(files, "added_tokens.json").items():
            added[token] = int(number), True
        for number, token in settings.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(number), bool(token.get("special"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer's added tokens are damaged ({error!r})") from None
    for source in (read_object(files, "special_tokens_map.json"), settings):
        for name in NAMED:
            named = token_text(source.get(name))
            if named and named in vocabulary:
                added.setdefault(named, (vocabulary[named], True))
    return added


def token_text(token: Any) -> str | None:
    """The text of a token in a tokenizer's settings: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def read_object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """The JSON object in the file `name`; an empty one if there is no such file.

    Raises:
      UserError: the file holds something else.
    """
    try:
        values = json.loads(files.get(name, "{}"))
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} is not a JSON object")
    return values

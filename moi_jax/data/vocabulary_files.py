"""tokenizer.json from the older files of a byte-level BPE: vocab.json, merges.txt, settings."""

import json
from collections.abc import Mapping
from typing import Any

from moi_jax.byte_level import SPLITS, tokenizer_json
from moi_jax.errors import UserError

# The files do not say how text is split: the class that tokenizer_config.json names does.
SPLIT_OF_CLASS = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def from_vocabulary_files(files: Mapping[str, str]) -> str:
    """The text of tokenizer.json for a vocab.json with merges.txt, by name.

    Raises:
      UserError: a file is missing or damaged, ids have gaps, or the split is not known.
    """
    if "merges.txt" not in files:
        raise UserError("vocab.json is there without merges.txt; copy it beside")
    vocabulary = read_object(files, "vocab.json")
    if not all(type(number) is int for number in vocabulary.values()):
        raise UserError("vocab.json is no object of tokens and their ids")
    settings = read_object(files, "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind not in SPLIT_OF_CLASS:
        raise UserError(
            f"vocab.json and merges.txt of tokenizer_class {settings.get('tokenizer_class')} in "
            f"tokenizer_config.json cannot be read, only of {' and '.join(SPLIT_OF_CLASS)}; save "
            f"the tokenizer as tokenizer.json"
        )
    added = _added(files, settings, vocabulary)
    numbers = {*vocabulary.values(), *(number for number, _ in added.values())}
    if numbers != set(range(len(numbers))):
        raise UserError("the ids of vocab.json and the added tokens have gaps")
    merges = _merges(files["merges.txt"])
    return tokenizer_json(vocabulary, merges, SPLITS[SPLIT_OF_CLASS[kind]], added)


def _merges(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    merges = []
    for line in lines:
        left, space, right = line.rstrip("\r").partition(" ")
        if not (left and space and right) or " " in right:
            raise UserError(f"merges.txt is damaged: {line!r} is no pair of tokens")
        merges.append((left, right))
    return merges


def _added(
    files: Mapping[str, str], settings: dict[str, Any], vocabulary: Mapping[str, int]
) -> dict[str, tuple[int, bool]]:
    """The tokens beside the vocabulary: their ids, and whether they are special."""
    added: dict[str, tuple[int, bool]] = {}
    # The newest of the two that list them wins; the older knows no tokens that are not special.
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
    """The text of a token in a tokenizer's settings, where it stands plain or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def read_object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """The JSON object in the file `name`, an empty one where there is no such file.

    Raises:
      UserError: the file holds something else.
    """
    try:
        values = json.loads(files.get(name, "{}"))
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} is no JSON object")
    return values

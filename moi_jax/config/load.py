"""From a config file and the overrides of the command line to one `Config`, or one clear line."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.config.files import NOT_YAML, parse_yaml, read_files

# Old names of keys that do not resemble the new ones.
RENAMED = {"eval.generate": "benchmarks"}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file over its bases, with `section.key=value` overrides over both.

    Raises:
      UserError: a file cannot be read, or a key or value is wrong. The message names the key
        and says what is valid.
    """
    values, files = read_files(Path(path))
    for override in overrides:
        apply_override(values, override)
    return make_config(values, where=" over ".join(map(str, files)))


def make_config(values: dict[str, Any], where: str = "config") -> Config:
    """The Config of a nested dict; errors begin with `where`.

    Raises:
      UserError: a key or value is wrong.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error)}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets `section.key=value` in place; the value is YAML, a number names a list element.

    Raises:
      UserError: it has another form, or names no place.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = parse_yaml(text)
    except NOT_YAML:
        raise UserError(f"the value of override {override!r} is not valid YAML") from None
    node: Any = values
    try:
        for part in parts[:-1]:
            if isinstance(node, list):
                node = node[int(part)]
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        last = parts[-1]
        node[int(last) if isinstance(node, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(f"override {override!r} does not name a place in the config") from None


def describe(error: ValidationError) -> str:
    """The first problem that pydantic found, as one line that says what is valid."""
    # A misspelt key is reported as missing too. The misspelling is the helpful one.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *section, key = (str(part) for part in first["loc"])
        valid = list(_valid_keys(first["loc"][:-1]))
        renamed = RENAMED.get(place)
        near = [renamed] if renamed else difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {key!r} in {'.'.join(section) or 'the top level'}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{place}: {message}" if place else message
    more = "" if first["type"] == "missing" else f" (got {first['input']!r})"
    return f"{place}: {message}{more}"


def _valid_keys(location: tuple[int | str, ...]) -> Iterator[str]:
    """The keys of the section at a pydantic location, e.g. ('data', 'domains', 0)."""
    section: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str):
            annotation: Any = section.model_fields[part].annotation
            # tuple[Domain, ...] -> Domain
            section = annotation if isinstance(annotation, type) else annotation.__args__[0]
    yield from section.model_fields
    if not location:
        yield "base"

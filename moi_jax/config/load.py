"""Reading an experiment: YAML and dotted overrides in, one `Config` or one clear line out."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moi_jax.common.errors import UserError
from moi_jax.config import Config

# PyYAML raises a plain ValueError on a date that is none, RecursionError on deep nesting.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

# Keys of the design that exist, with the values that are built so far.
BUILT: dict[str, tuple[Any, ...]] = {
    "model.attention": ("auto", "xla"),
    "mesh.context": (1,),
    "train.early_stopping_patience": (None,),
    "train.profile_steps": (None,),
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML config, applies `section.key=value` overrides, and resolves every default.

    Raises:
      UserError: the file cannot be read, or a key or value is wrong; names key and way out.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except NOT_YAML as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as 'data:', found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return make_config(values, where=str(path))


def make_config(values: dict[str, Any], where: str = "config") -> Config:
    """Validates a nested dict as a Config; `where` names its origin in errors."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error)}") from None
    for key, built in BUILT.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value not in built:
            raise UserError(
                f"{where}: {key}={value} is not built yet; use {' or '.join(map(str, built))}"
            )
    return config


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML keeps the last in silence."""


def _unique_mapping(loader: UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    keys = [loader.construct_object(key) for key in nodes]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.YAMLError(f"the key {key!r} stands twice, {nodes[index].start_mark}")
    return loader.construct_mapping(node, deep=True)


UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets `section.key=value` (value in YAML, a number names a list element) in place."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, Loader=UniqueKeyLoader)
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
        raise UserError(f"override {override!r} names no place in the config") from None


def describe(error: ValidationError) -> str:
    """The first problem pydantic found, as one line with the nearest valid key or the value."""
    # A misspelt key also shows as a missing one: the misspelling is what helps.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *section, key = (str(part) for part in first["loc"])
        valid = list(_valid_keys(first["loc"][:-1]))
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
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
    return iter(section.model_fields)

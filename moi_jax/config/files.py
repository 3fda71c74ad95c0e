"""Config files: YAML without doubled keys, merged over the file that `base:` names."""

import os
from pathlib import Path
from typing import Any

import yaml

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home

# PyYAML raises a plain ValueError on an impossible date, RecursionError on deep nesting.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

Values = dict[str, Any]


def read_files(path: Path, above: tuple[Path, ...] = ()) -> tuple[Values, list[Path]]:
    """The values of a config file merged over those of its base, and the files that were read.

    Args:
      above: the files whose bases led here, to find a circle.

    Returns:
      The sections, not validated yet and without `base`; the files, `path` first.

    Raises:
      UserError: a file cannot be read or holds no sections, `base` is not a path, or the bases
        form a circle.
    """
    files = (*above, path)
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise UserError(f"the bases of {above[0]} form a circle: {' -> '.join(map(str, files))}")
    values = _read(path, above)
    if "base" not in values:
        return values, [path]
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the path of another config file, found {base!r}")
    below, read = read_files(path.parent / expand_home(Path(base)), files)
    return merge(below, values), [path, *read]


def merge(below: Values, above: Values) -> Values:
    """`above` over `below`: mappings are merged key by key, all else is replaced.

    An empty mapping or section changes nothing:
    {"train": {"seed": 1, "steps": 2}} and {"train": {"steps": 3}, "loss": None}
    -> {"train": {"seed": 1, "steps": 3}, "loss": None}
    """
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and (value is None or isinstance(value, dict)):
            merged[key] = merge(old, value or {})
        else:
            merged[key] = value
    return merged


def _read(path: Path, above: tuple[Path, ...]) -> Values:
    """The values of one file as they are written there."""
    what = f"the base {path} of {above[-1]}" if above else f"the config {path}"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror}") from None
    except NOT_YAML as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as 'data:', found {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises one of NOT_YAML."""
    return yaml.load(text, Loader=UniqueKeyLoader)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice; plain YAML silently keeps the last one."""


def _unique_mapping(loader: UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    keys = [loader.construct_object(key) for key in nodes]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.YAMLError(f"the key {key!r} is given twice, {nodes[index].start_mark}")
    return loader.construct_mapping(node, deep=True)


UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)

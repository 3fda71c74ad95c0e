"""Patterns of dotted paths, by which a config names parameters."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

# "layers.3", "layers.0-15.mlp": some layers of the stack, before what is below them.
LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?(?=\.|$)")


def matching(paths: Iterable[str], pattern: str) -> list[str]:
    """Returns the paths that a pattern names.

    A pattern is a dotted path, in which `*` stands for any text, and names everything below it.
    """
    return [p for p in paths if fnmatchcase(p, pattern) or fnmatchcase(p, f"{pattern}.*")]

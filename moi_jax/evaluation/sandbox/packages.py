"""Installed packages that programs may import, with the packages that they require."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    packages_distributions,
)
from pathlib import Path

from moi_jax.common.errors import UserError

_REQUIRED = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True)
class Packages:
    """Packages that are visible in the sandbox.

    Attributes:
      versions: name and version of each one that was asked for, such as "numpy 2.4.0".
      directories: what is added to the module search path.
      files: the files and directories in them that are visible, absolute.
    """

    versions: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


NONE = Packages()


def find_packages(names: Iterable[str]) -> Packages:
    """Finds the packages, by the name of the distribution or of the module.

    Raises:
      UserError: a package is not installed, or its installation does not list its files.
    """
    asked = [_distribution(name) for name in dict.fromkeys(names)]
    found: dict[str, Distribution] = {}
    waiting = list(asked)
    while waiting:
        dist = waiting.pop()
        if dist.name in found:
            continue
        found[dist.name] = dist
        for requirement in dist.requires or []:
            match = _REQUIRED.match(requirement)
            if match and "extra ==" not in requirement:
                try:
                    waiting.append(distribution(match[1]))
                except PackageNotFoundError:
                    continue  # needed only elsewhere, for example on Windows
    files = {path for dist in found.values() for path in _files(dist)}
    directories = {str(Path(str(dist.locate_file("")))) for dist in found.values()}
    versions = tuple(f"{dist.name} {dist.version}" for dist in asked)
    return Packages(versions, tuple(sorted(directories)), tuple(sorted(files)))


def _distribution(name: str) -> Distribution:
    try:
        dist = distribution(name)
    except PackageNotFoundError:
        owners = packages_distributions().get(name)
        if not owners:
            raise UserError(
                f"--code-packages names {name}, which is not installed here; install it or leave "
                "it out"
            ) from None
        dist = distribution(owners[0])
    if not any(map(_is_importable, map(Path, _files(dist)))):
        raise UserError(
            f"--code-packages names {name}, but its installation lists no file that can be "
            "imported (is it an editable one?); install it as a wheel or leave it out"
        )
    return dist


def _is_importable(path: Path) -> bool:
    """Whether it is a module or the directory of a package."""
    if path.name.startswith("__editable__"):  # it only leads to the modules
        return False
    return path.name.isidentifier() if path.is_dir() else path.name.endswith(tuple(all_suffixes()))


def _files(dist: Distribution) -> set[str]:
    """The top-level files and directories of a distribution within its directory."""
    within = [f for f in dist.files or [] if not f.is_absolute() and ".." not in f.parts]
    tops = {file.parts[0] for file in within}
    paths = {Path(str(dist.locate_file(top))) for top in tops - {"__pycache__"}}
    return {str(path) for path in paths if path.exists()}

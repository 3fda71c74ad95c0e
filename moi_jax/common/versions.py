"""The versions of the code on which the values of a run depend."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("moi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def code_versions() -> dict[str, str | None]:
    """The version of each package and of Python, and under "code" a fingerprint of this package."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "code": _code_fingerprint(),
        "python": platform.python_version(),
    }


@functools.cache
def _code_fingerprint() -> str:
    """16 hex digits of all Python files of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
